"""One rank of ``benchmarks.soak``: the trainer's own command, which notes what its process holds every few steps, and
whose data cannot be read once where a file of that name asks for it. The first argument is the folder of both."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.train")

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qsharded import train
from qsharded.cli.command import run_as_process
from qsharded.data import Step, StepLoader
from qsharded.training import trainer

_EVERY = 5  # steps
_MIB = 2**20


def main() -> None:
    folder = Path(sys.argv.pop(1))
    accumulate, steps = trainer.accumulate_gradient, StepLoader.steps

    def noted(*args: Any, step_number: int, **named: Any) -> Any:
        if step_number % _EVERY == 0:
            _note(folder, step_number)
        return accumulate(*args, step_number=step_number, **named)

    def failing(*args: Any) -> Iterator[Step]:
        for step in steps(*args):
            _fail_where_asked(folder)
            yield step

    trainer.accumulate_gradient = noted
    StepLoader.steps = failing  # type: ignore[method-assign, assignment]
    train.main()


def _note(folder: Path, step: int) -> None:
    with suppress(OSError), (folder / f"held-{os.environ['RANK']}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step} | _held()) + "\n")


def _held() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return {
        "host_mib": pages * os.sysconf("SC_PAGE_SIZE") / _MIB,
        "device_mib": device / _MIB,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
    }


def _fail_where_asked(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        with suppress(FileNotFoundError):
            (folder / "loader-error").unlink()
            raise OSError("the soak's dataset cannot be read")


if __name__ == "__main__":
    run_as_process(main)
