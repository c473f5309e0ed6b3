"""How far the tokenizing is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

_LINE_S, _BAR_S = 10.0, 0.2


class ProgressBar:
    """Shows how much of ``total`` bytes was read and how many rows came of it.

    Args:
        title: what the line begins with.
        total: bytes; 0 where they are unknown.
        unit: what is counted in the place of rows.
        stream: by default standard error.
    """

    def __init__(
        self,
        title: str,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "rows",
    ) -> None:
        self._title, self._total, self._clock, self._unit = title, total, clock, unit
        self._stream = stream or sys.stderr
        self._every = _BAR_S if self._stream.isatty() else _LINE_S
        self._begun = self._shown = clock()
        self._begun_at: int | None = None
        self._width = 0

    def show(self, nbytes: int, rows: int) -> None:
        """That so much is done in all; it is shown if the last time was long enough ago."""
        if self._begun_at is None:
            self._begun_at = nbytes  # what an earlier run has left says nothing of this one's speed
        now = self._clock()
        if now - self._shown >= self._every:
            self._shown = now
            self._write(f"{self._title}: {self._share(nbytes)}{rows:,} {self._unit}{self._left(nbytes, now)}")

    def done(self, rows: int) -> None:
        """The last word."""
        self._write(f"{self._title}: {rows:,} {self._unit} in {_minutes(self._clock() - self._begun)}")
        if self._stream.isatty():
            self._stream.write("\n")

    def _share(self, nbytes: int) -> str:
        return f"{min(nbytes / self._total, 1):4.0%}, " if self._total else ""

    def _left(self, nbytes: int, now: float) -> str:
        done = nbytes - (self._begun_at or 0)
        if not self._total or done <= 0:
            return ""
        return f", {_minutes((self._total - nbytes) * (now - self._begun) / done)} left"

    def _write(self, line: str) -> None:
        if self._stream.isatty():
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _minutes(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02}"
