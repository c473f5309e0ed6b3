"""A dataset that is still being tokenized: what is there of it can be read while the rest is made.

It is read in windows of :data:`WINDOW` examples, which are the same however far the work is.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsharded.data.examples import Dataset
from qsharded.data.facts import taken
from qsharded.data.fill_progress import read_note
from qsharded.data.stored import StoredExamples
from qsharded.utils import heartbeat

WINDOW = 8192  # examples that are shuffled together: some seconds of tokenizing
_POLL_S = 0.05


@dataclass(frozen=True)
class Growing:
    """The examples that are on their way into the folder ``kept`` of a cache.

    Attributes:
        name: what the user calls the dataset.
        kept: the folder when it is complete; until then it ends in ``.part``.
    """

    name: str
    kept: Path

    @property
    def failed(self) -> Path:
        """The file that says why there will be no more."""
        return self.kept.with_suffix(".failed")

    def window(self, number: int) -> "Window":
        """A window, once its examples are there; behind the last one the first follows again.

        Raises:
            ValueError: the tokenizing has failed.
        """
        while (found := self._found(number)) is None:
            heartbeat.beat(f"waiting for rows of {self.name} to be tokenized")
            time.sleep(_POLL_S)
        return found

    def _found(self, number: int) -> "Window | None":
        if (state := self._state()) is None:
            return None
        note, folder, is_whole = state
        if is_whole:
            number %= -(-note["rows"] // WINDOW)
        first = number * WINDOW
        end = min(first + WINDOW, note["rows"])
        if end < first + WINDOW and not is_whole:
            return None
        try:
            examples = StoredExamples(folder, end, whole=False)
        except FileNotFoundError:  # it has just been completed
            return None
        return Window(number, Dataset.from_json(note["dataset"], taken(examples, np.arange(first, end))))

    def _state(self) -> tuple[dict[str, Any], Path, bool] | None:
        """(the note on what is there, the folder of it, whether that is all)."""
        if self.failed.exists():
            raise ValueError(self.failed.read_text(encoding="utf-8"))
        for folder in (self.kept, self.kept.with_suffix(".part")):
            try:
                return read_note(folder), folder, folder == self.kept
            except FileNotFoundError:
                continue
        return None


@dataclass(frozen=True)
class Window:
    """Examples of a dataset, from number :data:`WINDOW` times ``number`` on; the counts are those of all rows that were
    read so far."""

    number: int
    rows: Dataset
