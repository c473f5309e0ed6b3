"""Runs the lines of a record, each in a process of its own, and writes the record after every one of them."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.record import write

_MARK = "QSHARDED_BENCHMARK_RUN"
_LOG_LINES_SHOWN = 60


@dataclass(frozen=True)
class Job:
    """A command that leaves its :class:`Found` in ``result``.

    Attributes:
        asked: what must be found for it to pass.
        limit_s: seconds that it may take.
        alone: nothing runs beside it, as its speed or memory is measured.
        after: the job that it needs to have ended, which stands before it.
    """

    name: str
    asked: str
    command: list[str]
    result: Path
    limit_s: float
    alone: bool = False
    after: str | None = None


@dataclass(frozen=True)
class Found:
    """What came of a line, and which of the things asked for did not."""

    came: dict[str, Any]
    missed: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Leave it for the runner."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Outcome:
    """A line of the record."""

    name: str
    asked: str
    came: dict[str, Any]
    passed: bool
    seconds: float
    missed: list[str]


class Runner:
    """Runs jobs within a budget of time.

    Args:
        head: what the record says before its lines.
        record: the file, written after every line.
        logs: a folder for what each job printed.
        deadline: on ``time.monotonic``; jobs that have not begun by then are recorded as not run.
    """

    def __init__(self, head: dict[str, Any], record: Path, logs: Path, deadline: float) -> None:
        self._head, self._record, self._logs, self._deadline = head, record, logs, deadline
        self._outcomes: dict[str, Outcome] = {}
        self._marks: list[str] = []
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job], at_once: int = 1) -> bool:
        """Run those that may have company, so many at once, then the others; whether all of them passed."""
        self._order = [job.name for job in jobs]
        self._ended = {job.name: threading.Event() for job in jobs}
        with ThreadPoolExecutor(at_once) as pool:
            try:
                list(pool.map(self._run, [job for job in jobs if not job.alone]))
            except KeyboardInterrupt:
                self._stop()  # else the pool would wait for its jobs
                raise
        for job in jobs:
            if job.alone:
                self._run(job)
        return all(outcome.passed for outcome in self._outcomes.values())

    def _run(self, job: Job) -> None:
        if job.after in self._ended:
            self._ended[job.after].wait()
        try:
            self._note(self._outcome(job))
        finally:
            self._ended[job.name].set()

    def _stop(self) -> None:
        self._deadline = 0
        for mark in self._marks:
            end_marked(mark)

    def _outcome(self, job: Job) -> Outcome:
        start = time.monotonic()
        left = self._deadline - start
        found = self._found(job, min(job.limit_s, left)) if left > 0 else Found({}, ["not run: out of time"])
        seconds = round(time.monotonic() - start, 1)
        return Outcome(job.name, job.asked, found.came, not found.missed, seconds, found.missed)

    def _found(self, job: Job, limit_s: float) -> Found:
        log, mark = self._logs / f"{job.name}.log", uuid4().hex
        self._marks.append(mark)
        with log.open("wb") as out:
            process = subprocess.Popen(
                job.command, env=os.environ | {_MARK: mark}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return Found({}, [f"not done after {limit_s:.0f} s"])
            finally:
                end_marked(mark)
                process.wait()
        if status or not job.result.is_file():
            return Found({}, [f"exit status {status}: {_cause(log.read_text(errors='replace'))}"])
        return Found(**json.loads(job.result.read_text()))

    def _note(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[outcome.name] = outcome
            print(f"{'pass' if outcome.passed else 'FAIL'} {json.dumps(asdict(outcome))}", flush=True)
            log = self._logs / f"{outcome.name}.log"
            if not outcome.passed and log.is_file():
                print("\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]), flush=True)
            lines = [asdict(self._outcomes[name]) for name in self._order if name in self._outcomes]
            passed = sum(line["passed"] for line in lines)
            record = self._head | {"passed": passed, "of": len(self._order), "lines": lines}
            write(self._record, record)


def end_marked(mark: str) -> None:
    """Kill the processes of a mark, until none is left to start another. Each rank has a session of its own."""
    while pids := marked(mark):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked(mark: str, also: str = "") -> list[int]:
    """The live processes whose environment holds the mark, and also another entry."""
    wanted = {entry.encode() for entry in (f"{_MARK}={mark}", also) if entry}
    return [pid for pid, environment in _environments() if wanted <= environment]


def own_mark() -> str:
    """The mark of the job that this process belongs to."""
    return os.environ[_MARK]


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    """Of every process of ours that is no zombie: those have none."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            yield int(path.parent.name), set(path.read_bytes().split(b"\0"))
        except OSError:
            continue


def _cause(log: str) -> str:
    """The first line that names an error, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(error|Error|Exception|DamagedGather)\b[^/]*: ", line)]
    return (named or lines or ["no output"])[0 if named else -1][:300]
