"""Tokenizing a dataset into files: chunks of rows to processes, what they make of them into the files in order.

What is done is noted now and then, when it is on the disk. A fill that was killed goes on from there.
"""

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

from tqdm import tqdm

from qsharded.data.chunks import Chunk
from qsharded.data.examples import Dataset
from qsharded.data.fill_progress import Enough, Notes, Progress
from qsharded.data.load import Reading
from qsharded.data.row_source import RowSource
from qsharded.data.stored import TOKEN_BYTES, ExampleFiles, packed
from qsharded.data.tokenizer import Tokenizer
from qsharded.utils.progress_bar import ProgressBar

_AHEAD = 8  # chunks on their way for each process: enough that none waits for the disk, few enough to be held


class Interrupted(ValueError):
    """The work was stopped from outside; the same call goes on with it."""


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
        progress = Progress.read(self.folder)
        title, bar = f"tokenizing {self.name}", None
        if self.shows_progress:
            bar = ProgressBar(title, self.source.nbytes, done=progress.nbytes)
        with (
            ExampleFiles(self.folder, progress.sizes) as files,
            Notes(self.folder, files, progress, self.noted) as notes,
            self._executor() as executor,
        ):
            left = islice(self.source.chunks(), progress.chunks, None)
            for chunk, (block, rows, dataset) in self._tokenized(left, executor):
                if self.enough and progress.has(self.enough):
                    break
                files.add(block)
                progress.add(chunk, rows, len(block[0]) // TOKEN_BYTES, dataset)
                self.reading.check_bad(progress.dataset, all_read=self.noted < sys.maxsize)
                notes.at_times()
                if bar:
                    bar.reach(progress.nbytes, f"{progress.rows:,} rows")
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
