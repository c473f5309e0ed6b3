"""How far something is: tqdm's bar on a terminal, elsewhere a line now and then.

huggingface-hub brings tqdm, so it costs no further package.
"""

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

_LINE_S = 10.0  # between lines
_DELAY_S = 0.5  # what is done sooner shows no bar


class _Bar(tqdm):
    monitor_interval = 0  # no thread that redraws a bar whose work is slow: tokenizing forks its workers


class ProgressBar:
    """Shows how much of ``total`` is done.

    Args:
        title: what the line begins with.
        total: 0 where it is not known.
        unit: "B" for bytes, of which thousands are named; else a word with a space in front.
        done: what was done before, which says nothing of the speed.
        stays: whether the bar is left on the terminal at the end.
        speed: whether a terminal's bar says how much a second.
        stream: by default standard error.
        clock: for the lines.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "B",
        *,
        done: int = 0,
        stays: bool = False,
        speed: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self.is_terminal = self._stream.isatty()
        self._begun = self._shown = clock()
        self._done = self._before = done
        scaled = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
        self._how: dict[str, Any] = {"total": total or None, "unit": unit, **scaled}
        self._title, self._stays, self._speed = title, stays, speed
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, more: int) -> None:
        """So much more is done."""
        self.reach(self._done + more)

    def reach(self, done: int, note: str = "") -> None:
        """So much is done in all; ``note`` stands at the end of the line."""
        if self.is_terminal:
            self._draw(done, note)
        elif self._clock() - self._shown >= _LINE_S:
            self._shown = self._clock()
            elapsed = self._shown - self._begun
            how = {"initial": self._before, "ncols": 0, "prefix": self._title, "postfix": note, **self._how}
            self._put(tqdm.format_meter(done, elapsed=elapsed, **how) + "\n")
        self._done = done

    def message(self, text: str) -> None:
        """Print a line, above the bar."""
        if self.is_terminal:
            _Bar.write(_writable(text, self._stream), file=self._stream)
            self._stream.flush()
        else:
            self._put(text + "\n")

    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._begun

    def close(self) -> None:
        """There is no more to come."""
        if self._bar is not None:
            self._bar.close()

    def _draw(self, done: int, note: str) -> None:
        is_first = self._bar is None
        self._bar = self._opened() if self._bar is None else self._bar
        self._bar.ncols = _columns()  # not tqdm's own look-up, which takes a terminal that tells no size for one of 0
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        if is_first and self._stays:
            self._bar.refresh()  # it would wait for the next time

    def _opened(self) -> _Bar:
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # a narrow one loses its end
        bar = _Bar(
            desc=self._title,
            initial=self._before,
            file=self._stream,
            leave=self._stays,
            delay=0 if self._stays else _DELAY_S,
            ncols=_columns(),
            nrows=shutil.get_terminal_size().lines,  # nor this: in a terminal of no rows it shows nothing
            miniters=1,
            smoothing=0,  # what interrupts the work comes again: it belongs to the time that is left
            bar_format=None if self._speed else form,
            **self._how,
        )
        bar.start_t = time.time() - self.seconds()
        return bar

    def _put(self, text: str) -> None:
        self._stream.write(_writable(text, self._stream))
        self._stream.flush()


def _columns() -> int:
    """The terminal's, less one: it wraps when the last one is filled."""
    return max(shutil.get_terminal_size().columns - 1, 1)


def _writable(text: str, stream: TextIO) -> str:
    """``text`` with a question mark for what the stream's encoding does not have."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
