"""A command that runs lines, each in a process of its own, and keeps a record."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.record import command, environment
from benchmarks.two_gpus.line import Line, job
from benchmarks.two_gpus.runner import Runner
from benchmarks.two_gpus.small import RANKS


def record_lines(module: str, doc: str | None, of_one: str, lines: Callable[[bool], list[Line]]) -> None:
    """The command ``python -m module``. ``of_one``: the module that runs one of ``lines`` in a process."""
    deadline = time.monotonic()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("benchmarks/results", f"{module.rpartition('.')[2]}.json")
    gpus = torch.cuda.device_count()
    parser.add_argument("--lines", nargs="+", metavar="NAME", help="these, and what they need; by default all")
    parser.add_argument("--minutes", type=float, default=9.0, help="lines that have not begun by then are not run")
    parser.add_argument("--at-once", type=int, default=2 if gpus else 1, help="of the lines that measure nothing")
    parser.add_argument("--short", action="store_true", help="tiny shapes, for a machine without GPUs")
    parser.add_argument("--record", type=Path, default=default)
    parser.add_argument("--logs", type=Path, help="a folder for what each line printed")
    given = parser.parse_args()
    if gpus < RANKS and not given.short:
        parser.error(f"this machine has {gpus} GPUs; {RANKS} are needed, or --short")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is cut off ends its processes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (RANKS * given.at_once))))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        logs = given.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        runner = Runner(
            environment() | {"command": command(module)},
            given.record,
            logs,
            deadline + 60 * given.minutes,
        )
        jobs = [job(line, of_one, folder, given.short) for line in chosen(lines(given.short), given.lines)]
        passed = runner.run(jobs, given.at_once)
    sys.exit(not passed)


def chosen(known: list[Line], names: list[str] | None) -> list[Line]:
    """The lines of these names, or all, and before each the one that it needs."""
    if unknown := set(names or ()) - {line.name for line in known}:
        sys.exit(f"there is no line {', '.join(sorted(unknown))}: {', '.join(line.name for line in known)}")
    wanted = set(names or (line.name for line in known))
    wanted |= {line.after for line in known if line.name in wanted and line.after}
    return [line for line in known if line.name in wanted]
