"""Examples in files, read through a memory map: no rank holds more of them than the batch that it makes.

Two files. ``tokens.bin``: int32, one a token, example after example; the sign bit is set where the token is trained.
``facts.bin``: :data:`qsharded.data.facts.FACTS`, one an example.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from qsharded.data.examples import Example
from qsharded.data.facts import FACTS, ExamplesView, Facts, facts_of

_TOKENS, _FACTS = "tokens.bin", "facts.bin"
_TOKEN = np.dtype("<i4")
TOKEN_BYTES = _TOKEN.itemsize
_TRAINED = np.int32(np.iinfo(np.int32).min)  # the sign bit
# Pages that were read count as this process's memory while they are mapped: they are let go after so many bytes. What
# the file system caches of them stays, for all ranks. A read maps pages around its own too, up to a huge page of them.
_MAPPED_BYTES = 64 << 20
_AROUND_BYTES = 2 << 20


def packed(examples: Sequence[Example]) -> tuple[bytes, bytes]:
    """What the two files hold of ``examples``, which have no groups."""
    assert all(example.group is None for example in examples), "groups are of rows in memory"
    ids = np.concatenate([np.zeros(0, np.int32), *(example.ids for example in examples)])
    trained = np.concatenate([np.zeros(0, np.bool_), *(example.trained for example in examples)])
    return np.where(trained, ids | _TRAINED, ids).astype(_TOKEN).tobytes(), facts_of(examples).tobytes()


class ExampleFiles:
    """Writes the files of a folder, block by block, to go on behind the first ``sizes`` bytes of them."""

    def __init__(self, folder: Path, sizes: Sequence[int] = (0, 0)) -> None:
        self._files = [_opened(folder / name, size) for name, size in zip((_TOKENS, _FACTS), sizes, strict=True)]

    def add(self, block: tuple[bytes, bytes]) -> None:
        """Put what :func:`packed` gave behind what is there."""
        for file, data in zip(self._files, block, strict=True):
            file.write(data)

    def flushed(self) -> list[int]:
        """Give what was added to the system, where other processes can read it; the sizes then."""
        for file in self._files:
            file.flush()
        return [file.tell() for file in self._files]

    def sync(self) -> None:
        """Bring what was flushed onto the disk. Another thread may add more meanwhile."""
        for file in self._files:
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def _opened(path: Path, size: int) -> BinaryIO:
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


class StoredExamples(ExamplesView):
    """The ``count`` examples that :class:`ExampleFiles` wrote into ``folder``, or, unless ``whole``, the first so many.

    Raises:
        ValueError: the files are not as long as each other says.
    """

    def __init__(self, folder: Path, count: int, *, whole: bool = True) -> None:
        self.facts: Facts = np.fromfile(folder / _FACTS, FACTS, -1 if whole else count)
        if len(self.facts) != count:
            raise ValueError(f"{folder / _FACTS} is of {len(self.facts):,} examples, {count:,} belong there")
        self._starts = np.concatenate([[0], np.cumsum(self.facts["length"], dtype=np.int64)]) * _TOKEN.itemsize
        with (folder / _TOKENS).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._starts[-1] or (whole and size != self._starts[-1]):
                raise ValueError(f"{folder / _TOKENS} has {size:,} bytes, {self._starts[-1]:,} belong there")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        self._mapped = 0

    def example(self, number: int) -> Example:
        assert self._map is not None, "only no examples have no tokens"
        start, end = self._starts[number : number + 2].tolist()
        # sliced, the map gives a copy
        tokens: NDArray[np.int32] = np.frombuffer(self._map[start:end], _TOKEN).astype(np.int32, copy=False)
        self._let_go(end - start)
        return Example(tokens & ~_TRAINED, tokens < 0)

    def _let_go(self, read: int) -> None:
        self._mapped += read + _AROUND_BYTES
        if self._mapped > _MAPPED_BYTES and self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._mapped = 0
