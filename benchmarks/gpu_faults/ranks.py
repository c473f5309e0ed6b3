"""Ranks without a launcher, so that how each one ends is seen, and not what torchrun makes of it."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import resume
from benchmarks.launch import flags_of
from benchmarks.two_gpus.small import RANKS, SMALL, UNEVALUATED

BUILTIN: dict[str, Any] = SMALL | UNEVALUATED | {"per_device_train_batch_size": 2}


@dataclass(frozen=True)
class Rank:
    """A process, and the file of what it prints."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


def start(folder: Path, words: Sequence[str], options: dict[str, Any]) -> list[Rank]:
    """``python -m`` these words and options, on each rank; what they print lies in ``folder``."""
    folder.mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(resume.free_port()), "PYTHONUNBUFFERED": "1"}
    shared |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    return [_start(folder / f"rank-{rank}.txt", rank, [*words, *flags_of(options)], shared) for rank in range(RANKS)]


def _start(log: Path, rank: int, words: Sequence[str], shared: dict[str, str]) -> Rank:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=os.environ | shared | own,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    return Rank(process, log)


def statuses(ranks: Sequence[Rank]) -> list[int]:
    """Wait for all; print what they said, for the line's log."""
    found = [rank.process.wait() for rank in ranks]
    for rank in ranks:
        print(f"--- {rank.log.name}", *rank.said(), sep="\n", flush=True)
    return found


def wait_for_steps(ranks: Sequence[Rank], output: Path, steps: int) -> None:
    """Until so many steps are logged."""
    while len(resume.losses(output)) < steps:
        for rank in ranks:
            assert rank.process.poll() is None, "\n".join(rank.said())
        time.sleep(0.05)
