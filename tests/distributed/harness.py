"""Run a function on several ranks of this machine, each a process of its own that does as CUDA does.

They talk over gloo; where every rank has a GPU of its own, what lies on GPUs goes over NCCL."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.as_cuda import run_as_cuda

# A server that has imported torch once forks each rank in a fraction of the time that a fresh interpreter takes.
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor"])

TIMEOUT_S = 240
ATTEMPTS = 3  # gloo now and then fails to connect ranks that start at the same time as others on this machine


class NeverMet(AssertionError):
    """The ranks did not find each other: nothing of the test has run."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world_size`` ranks. Its values must be picklable by torch.save.

    Raises:
        AssertionError: a rank failed; the message holds its traceback.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return _run_ranks(function, world_size, *args)
        except NeverMet as error:
            print(error)
    return _run_ranks(function, world_size, *args)


def _run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            _context.Process(target=_rank_main, args=(function, args, rank, world_size, port, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _join(ranks, Path(folder))
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(function: Callable[..., Any], args: tuple, rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world_size > 1 else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    except BaseException:
        Path(folder, f"{rank}.unmet").write_text(traceback.format_exc())
        os._exit(1)
    try:
        run_as_cuda()
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
        if dist.is_initialized():  # the function may have left it by itself
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def _join(ranks: list[Any], folder: Path) -> None:
    """Wait for all; when one fails, end the others, which would wait for it in a collective."""
    waiting = list(ranks)
    while waiting:
        done = wait([process.sentinel for process in waiting], timeout=TIMEOUT_S)
        finished = [process for process in waiting if process.sentinel in done]
        for process in finished:
            process.join()
        failed = [process for process in finished if process.exitcode != 0]
        if failed or not done:
            _end(ranks)
            errors = _read(folder, "*.error")
            if unmet := _read(folder, "*.unmet"):
                raise NeverMet(f"{unmet}\n{errors}")  # a rank that met others may have failed by itself
            raise AssertionError(errors or f"no rank finished within {TIMEOUT_S} s")
        waiting = [process for process in waiting if process not in finished]


def _read(folder: Path, names: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(names)))


def _end(ranks: list[Any]) -> None:
    for process in ranks:
        if process.is_alive():
            process.terminate()
        process.join()
