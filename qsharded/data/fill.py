"""Tokenizing a dataset into files: chunks of rows to processes, what they make of them into the files in order.

What is done is noted now and then (:data:`_NOTE`), when it is on the disk. A fill that was killed goes on from there.
"""

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qsharded.data.chunks import Chunk
from qsharded.data.examples import Dataset
from qsharded.data.load import Reading
from qsharded.data.row_source import RowSource
from qsharded.data.stored import TOKEN_BYTES, ExampleFiles, packed
from qsharded.data.tokenizer import Tokenizer
from qsharded.utils.durable_files import write_whole
from qsharded.utils.progress_bar import ProgressBar

_NOTE = "done.json"
_NOTE_S = 5.0
_AHEAD = 8  # chunks on their way for each process: enough that none waits for the disk, few enough to be held


class Interrupted(ValueError):
    """The work was stopped from outside; the same call goes on with it."""


@dataclass(frozen=True)
class Enough:
    """How many examples and tokens of a dataset are needed at least; the rows behind them are not read."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class Fill:
    """A dataset to be tokenized.

    Attributes:
        name: what the user calls the dataset.
        source: its rows.
        folder: where the files of examples go; it exists.
        workers: processes that tokenize; 1: this one alone.
        shows_progress: on standard error.
        enough: what is needed of the rows; None: all.
        noted: examples after which what is done is noted, whenever the last time was, for others that already read
            them; bad rows then count at once, and not when all are read.
    """

    name: str
    source: RowSource
    tokenizer: Tokenizer
    reading: Reading
    folder: Path
    workers: int
    shows_progress: bool
    enough: Enough | None = None
    noted: int = sys.maxsize

    def run(self) -> None:
        """Fill the folder, or go on with it.

        Raises:
            ValueError: a malformed row, nothing to learn, or a process that was killed.
            OSError: a file could not be written.
        """
        progress = _Progress.read(self.folder)
        title, bar = f"tokenizing {self.name}", None
        if self.shows_progress:
            bar = ProgressBar(title, self.source.nbytes, done=progress.nbytes)
        with ExampleFiles(self.folder, progress.sizes) as files, self._executor() as executor:
            left = islice(self.source.chunks(), progress.chunks, None)
            for chunk, (block, rows, dataset) in self._tokenized(left, executor):
                if self.enough and progress.has(self.enough):
                    break
                files.add(block)
                progress.add(chunk, rows, len(block[0]) // TOKEN_BYTES, dataset)
                self.reading.check_bad(progress.dataset, all_read=self.noted < sys.maxsize)
                progress.note_at_times(self.folder, files, self.noted)
                if bar:
                    bar.reach(progress.nbytes, f"{progress.rows:,} rows")
            progress.note(self.folder, files)
        self.reading.check_any(progress.dataset, progress.rows, self.name)
        if bar:
            bar.close()
            bar.message(f"{title}: {progress.rows:,} rows in {tqdm.format_interval(bar.seconds())}")

    def _tokenized(self, of: Iterable[Chunk], executor: Executor | None) -> Iterator[tuple[Chunk, "_Found"]]:
        if executor is not None:
            return _in_order(executor, of, self.workers * _AHEAD)
        return ((chunk, _tokenized(chunk, self.tokenizer, self.reading.of_part)) for chunk in of)

    def _executor(self) -> AbstractContextManager[Executor | None]:
        if self.workers == 1:
            return nullcontext()
        context = get_context("fork")  # of a process that has done nothing yet; see tokenizing.py
        given = (self.tokenizer, self.reading.of_part, os.getpid())
        return ProcessPoolExecutor(self.workers, context, initializer=_begin, initargs=given)


def read_note(folder: Path) -> dict[str, Any]:
    """What :meth:`Fill.run` noted last: ``rows``, how many examples, and ``dataset``, for ``Dataset.from_json``.

    Raises:
        OSError, ValueError: there is no such note.
    """
    note: dict[str, Any] = json.loads((folder / _NOTE).read_bytes())
    return note


@dataclass
class _Progress:
    chunks: int
    nbytes: int
    rows: int
    tokens: int
    sizes: list[int]
    dataset: Dataset
    noted_at: float
    noted_rows: int = 0

    @classmethod
    def read(cls, folder: Path) -> "_Progress":
        try:
            read = read_note(folder)
        except FileNotFoundError:
            return cls(0, 0, 0, 0, [0, 0], Dataset([]), time.monotonic())
        dataset = Dataset.from_json(read.pop("dataset"), [])
        return cls(**read, dataset=dataset, noted_at=time.monotonic(), noted_rows=read["rows"])

    def has(self, enough: Enough) -> bool:
        return self.rows >= enough.examples and self.tokens >= enough.tokens

    def add(self, chunk: Chunk, rows: int, tokens: int, dataset: Dataset) -> None:
        self.chunks += 1
        self.nbytes += chunk.nbytes
        self.rows += rows
        self.tokens += tokens
        self.dataset.add(dataset)

    def note_at_times(self, folder: Path, files: ExampleFiles, most_rows: int) -> None:
        if time.monotonic() - self.noted_at > _NOTE_S or self.rows - self.noted_rows >= most_rows:
            self.note(folder, files)

    def note(self, folder: Path, files: ExampleFiles) -> None:
        self.sizes = files.on_disk()
        counts = {name: getattr(self, name) for name in ("chunks", "nbytes", "rows", "tokens", "sizes")}
        write_whole(folder / _NOTE, json.dumps(counts | {"dataset": self.dataset.to_json()}).encode())
        self.noted_at, self.noted_rows = time.monotonic(), self.rows


_Found = tuple[tuple[bytes, bytes], int, Dataset]


def _in_order(executor: Executor, of: Iterable[Chunk], ahead: int) -> Iterator[tuple[Chunk, _Found]]:
    """Each chunk with what becomes of it."""
    waiting: deque[tuple[Chunk, Future[_Found]]] = deque()
    try:
        for chunk in of:
            waiting.append((chunk, executor.submit(_tokenized_by_worker, chunk)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        yield from ((chunk, future.result()) for chunk, future in waiting)
    except BrokenProcessPool:
        raise Interrupted(
            "a process that tokenizes was killed: where it said nothing above, most likely since memory was short; the "
            "same command goes on from where it was"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _tokenized(chunk: Chunk, tokenizer: Tokenizer, reading: Reading) -> _Found:
    dataset = reading.examples(chunk.rows(), tokenizer)
    examples, dataset.examples = dataset.examples, []
    return packed(examples), len(examples), dataset


# What a process that tokenizes works with: sent with each chunk it would take longer than the chunk does.
_worker: tuple[Tokenizer, Reading]


def _begin(tokenizer: Tokenizer, reading: Reading, parent: int) -> None:
    global _worker
    _worker = tokenizer, reading
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    leave_with(parent)


def _tokenized_by_worker(chunk: Chunk) -> _Found:
    return _tokenized(chunk, *_worker)


def leave_with(parent: int) -> None:
    """End this process when ``parent``, which started it, has ended, even where nothing could be done about it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
