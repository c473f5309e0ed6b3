"""Steps over rows that come in windows, of which the next one may still be tokenized."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qsharded.data.facts import joined
from qsharded.data.loader import Cursor, Step, StepLoader
from qsharded.data.ragged import Numbers

_FIRST = Cursor()
_Part = tuple[StepLoader, list[Numbers]]


class WindowLoader:
    """Endless steps, window after window. A window's rows are shuffled within it; it is the ``epoch`` of a cursor.
    Every step has as many rows: the last one of a window takes what it is short of from the next.

    Args:
        loader_of: from a window's number to the loader of its rows; it waits until they are there.

    Attributes:
        rows_per_step: of all ranks together.
    """

    def __init__(self, loader_of: Callable[[int], StepLoader]) -> None:
        self._loader_of = loader_of
        self._last = 0, loader_of(0)
        self.rows_per_step = self._last[1].rows_per_step

    def steps(self, cursor: Cursor = _FIRST) -> Iterator[Step]:
        """The steps from ``cursor`` on.

        Raises:
            ValueError: as ``StepLoader.steps``, or the tokenizing has failed.
        """
        while True:
            step = self._step(cursor)
            yield step
            cursor = step.cursor

    def _step(self, cursor: Cursor) -> Step:
        parts: list[_Part] = []
        missing = self.rows_per_step
        while missing:
            loader = self._window(cursor.epoch)
            rows = loader.rows_from(cursor, missing)
            missing -= len(rows)
            parts += [(loader, rows)] if rows else []
            cursor = Cursor(cursor.epoch + 1) if missing else Cursor(cursor.epoch, cursor.row + len(rows))
        return _step_of(parts, cursor)

    def _window(self, number: int) -> StepLoader:
        if self._last[0] != number:
            self._last = number, self._loader_of(number)
        return self._last[1]


def _step_of(parts: Sequence[_Part], cursor: Cursor) -> Step:
    """The step of the rows of several windows."""
    if len(parts) == 1:
        loader, rows = parts[0]
        return loader.step_of(rows, cursor)
    joint, before = [], 0
    for loader, rows in parts:
        joint += [row + before for row in rows]
        before += len(loader.examples)
    return replace(parts[0][0], examples=joined([loader.examples for loader, _ in parts])).step_of(joint, cursor)
