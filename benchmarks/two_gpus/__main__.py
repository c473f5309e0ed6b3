"""Everything that takes two GPUs, in one command and one record: what was asked, what came, pass or fail.

    python -m benchmarks.two_gpus [--lines NAME ...] [--minutes 9] [--record FILE] [--logs FOLDER]
    python -m benchmarks.two_gpus --short    # the same lines with tiny shapes, on a machine without GPUs, over gloo

Each line runs in a process of its own under a limit of its own; one that fails leaves the others alone. The record is
written after every line. The exit status is 1 unless all lines passed.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import command, environment
from benchmarks.two_gpus.lines import Line, job, lines
from benchmarks.two_gpus.runner import Runner
from benchmarks.two_gpus.small import RANKS


def main() -> None:
    deadline = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--lines", nargs="+", metavar="NAME", help="these, and what they need; by default all")
    parser.add_argument("--minutes", type=float, default=9.0, help="lines that have not begun by then are not run")
    parser.add_argument("--at-once", type=int, default=2 if gpus else 1, help="of the lines that measure nothing")
    parser.add_argument("--short", action="store_true", help="tiny shapes, for a machine without GPUs")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/two_gpus.json"))
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
            environment() | {"command": command("benchmarks.two_gpus")},
            given.record,
            logs,
            deadline + 60 * given.minutes,
        )
        jobs = [job(line, folder, given.short) for line in chosen(lines(given.short), given.lines)]
        passed = runner.run(jobs, given.at_once)
    sys.exit(not passed)


def chosen(known: list[Line], names: list[str] | None) -> list[Line]:
    """The lines of these names, or all, and before each the one that it needs."""
    if unknown := set(names or ()) - {line.name for line in known}:
        sys.exit(f"there is no line {', '.join(sorted(unknown))}: {', '.join(line.name for line in known)}")
    wanted = set(names or (line.name for line in known))
    wanted |= {line.after for line in known if line.name in wanted and line.after}
    return [line for line in known if line.name in wanted]


if __name__ == "__main__":
    main()
