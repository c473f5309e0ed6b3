"""``qsharded train``: the ranks of a run, started by this process as torchrun would, without its report of 30 lines.

Where somebody has started ranks already, torchrun (RANK) or Slurm's srun (SLURM_PROCID), nothing is started: this
process is one of them.
"""

import logging
import os
import runpy
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from qsharded.config import parse_train

_MODULE = "qsharded.train"
_PORTS = 20000, 20000  # the first of those that jobs of one node share out, and how many


def train(argv: Sequence[str]) -> None:
    """Train with ``argv`` on as many ranks as ``--ranks`` or this machine's GPUs; a mistake in it is told once."""
    config = parse_train(argv)
    if "RANK" in os.environ or config.dry_run:
        return _run_here(argv)
    if "SLURM_PROCID" in os.environ and (config.ranks or 1) == 1:
        join_slurm(os.environ)
        return _run_here(argv)
    ranks = config.ranks or _gpus()
    if ranks == 1:
        # not in this process, which has threads by now: a command answers signals before there are any
        os.execv(sys.executable, [sys.executable, "-m", _MODULE, *argv])
    raise SystemExit(start_ranks(ranks, [sys.executable, "-u", "-m", _MODULE, *argv]))


def _run_here(argv: Sequence[str]) -> None:
    sys.argv[1:] = argv
    runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)


def _gpus() -> int:
    from qsharded.utils.hardware import default_ranks  # here: it imports torch

    return default_ranks()


def join_slurm(environment: MutableMapping[str, str]) -> None:
    """Describe the tasks of an srun as torchrun describes its ranks; one task alone is a run by itself."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1:
        return
    first_port, ports = _PORTS
    port = first_port + int(environment.get("SLURM_JOB_ID", 0)) % ports
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": _first_node(environment),
        "MASTER_PORT": str(port),
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment["SLURM_STEP_NODELIST"]
    if "[" not in nodes and "," not in nodes:
        return nodes
    words = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0]


def start_ranks(ranks: int, command: Sequence[str]) -> int:
    """Run ``command`` as ``ranks`` processes that find each other, as ``torchrun --standalone`` does.

    A rank that fails has said why; only of one that was killed a line is printed here. Returns the exit status: 0, the
    first failed rank's, or 128 + the number of a signal, which the ranks are given and which ends them.
    """
    from torch.distributed.elastic.multiprocessing import SignalException  # here: they import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from qsharded.utils import hardware

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    logging.disable()  # the agent's own account of what the ranks say themselves
    kills_before = hardware.memory_kills()
    try:
        elastic_launch(_one_node(ranks), command[0])(*command[1:])
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return _status(rank, failure.exitcode, hardware.memory_kills() - kills_before)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _one_node(ranks: int) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        signals_to_handle=",".join(_passed_on()),
    )


def _passed_on() -> list[str]:
    """The signals that the ranks are given: those that they answer, but not a hang-up under nohup."""
    names = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"]
    return names if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*names, "SIGHUP"]


def _status(rank: int, exitcode: int, kills: int) -> int:
    """The exit status for a failed rank's, which is negative where a signal killed it without a word.

    ``kills``: processes that the kernel has killed meanwhile for lack of memory.
    """
    if exitcode >= 0:
        return exitcode
    name = signal.Signals(-exitcode).name
    cause = " by the kernel, for lack of host memory: fewer ranks, no --cpu-offload" if kills else ""
    print(f"{_MODULE}: error: rank {rank} was killed with {name}{cause}", file=sys.stderr, flush=True)
    return 128 - exitcode
