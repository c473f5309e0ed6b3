"""A line of a record, and how it becomes a process: ``python -m MODULE NAME FOLDER RESULT [--short]``."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.two_gpus.runner import Found, Job


@dataclass(frozen=True)
class Line:
    """One line: ``run`` is given the folder that all lines share, and what else is as in ``Job``."""

    name: str
    asked: str
    run: Callable[[Path], Found]
    limit_s: float = 75
    alone: bool = False
    after: str | None = None


def job(line: Line, module: str, folder: Path, short: bool) -> Job:
    """The line as a command of ``module``, which calls :func:`run_one`."""
    result = folder / f"{line.name}.found.json"
    words = [line.name, str(folder), str(result), *(["--short"] if short else [])]
    command = [sys.executable, "-m", module, *words]
    patience = 4 if short else 1  # a machine without GPUs has few cores, and ranks on each
    return Job(line.name, line.asked, command, result, patience * line.limit_s, line.alone, line.after)


def run_one(lines: Callable[[bool], list[Line]]) -> None:
    """Run the one of ``lines`` that the process's arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args()
    chosen = {line.name: line for line in lines(given.short)}[given.name]
    chosen.run(given.folder).write(given.result)
