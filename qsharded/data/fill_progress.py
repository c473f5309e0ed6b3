"""How far the tokenizing of a dataset is, noted now and then beside its files, so that it can go on from there."""

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from qsharded.data.chunks import Chunk
from qsharded.data.examples import Dataset
from qsharded.data.stored import ExampleFiles
from qsharded.utils.durable_files import write_whole

_NOTE = "done.json"
_NOTE_S = 2.0


@dataclass(frozen=True)
class Enough:
    """How many examples and tokens of a dataset are needed at least; the rows behind them are not read."""

    examples: int
    tokens: int


def read_note(folder: Path) -> dict[str, Any]:
    """What was noted last: ``rows``, how many examples, and ``dataset``, for ``Dataset.from_json``.

    Raises:
        OSError, ValueError: there is no such note.
    """
    note: dict[str, Any] = json.loads((folder / _NOTE).read_bytes())
    return note


@dataclass
class Progress:
    """What is done: ``chunks`` of so many bytes, which became ``rows`` examples of ``tokens``; ``sizes``, of the files
    that hold them; and in ``dataset`` the counts of other rows."""

    chunks: int = 0
    nbytes: int = 0
    rows: int = 0
    tokens: int = 0
    sizes: list[int] = field(default_factory=lambda: [0, 0])
    dataset: Dataset = field(default_factory=lambda: Dataset([]))

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """As it was noted in ``folder``."""
        try:
            read = read_note(folder)
        except FileNotFoundError:
            return cls()
        return cls(**read | {"dataset": Dataset.from_json(read["dataset"], [])})

    def has(self, enough: Enough) -> bool:
        """Whether so much is done."""
        return self.rows >= enough.examples and self.tokens >= enough.tokens

    def add(self, chunk: Chunk, rows: int, tokens: int, dataset: Dataset) -> None:
        """Count a chunk, and what became of it."""
        self.chunks += 1
        self.nbytes += chunk.nbytes
        self.rows += rows
        self.tokens += tokens
        self.dataset.add(dataset)

    def to_json(self) -> bytes:
        """For :meth:`read`."""
        return json.dumps(vars(self) | {"dataset": self.dataset.to_json()}).encode()


class Notes:
    """Notes the progress when ``files``, which are in ``folder``, are on the disk; a slow disk holds nobody up. Leaving
    the context notes all of it.

    Args:
        most_rows: after so many more examples there is another note, whenever the last was.
    """

    def __init__(self, folder: Path, files: ExampleFiles, progress: Progress, most_rows: int) -> None:
        self._folder, self._files, self._progress, self._most_rows = folder, files, progress, most_rows
        self._rows, self._at = progress.rows, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "note")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._thread, suppress(OSError) if kind else nullcontext():
            self._write()
            self._await()

    def at_times(self) -> None:
        """Note the progress if the last note is old, and written.

        Raises:
            OSError: that could not be.
        """
        is_due = time.monotonic() - self._at > _NOTE_S or self._progress.rows - self._rows >= self._most_rows
        if is_due and (self._writing is None or self._writing.done()):
            self._write()

    def _write(self) -> None:
        self._await()
        self._progress.sizes = self._files.flushed()
        self._rows, self._at = self._progress.rows, time.monotonic()
        self._writing = self._thread.submit(self._bring_to_disk, self._progress.to_json())

    def _await(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _bring_to_disk(self, note: bytes) -> None:
        self._files.sync()
        write_whole(self._folder / _NOTE, note)
