"""A dataset's rows in chunks that any process can read by itself, cut in the same places every time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

from qsharded.data.records import (
    FoundRows,
    Row,
    check_not_empty,
    find_rows_in,
    has_lines,
    json_lines,
    parquet_rows,
    row_groups,
)
from qsharded.data.sources import suffix_of

_BYTES = 1 << 19  # of JSON Lines: some hundred conversations
_ROWS = 512


class Chunk(Protocol):
    """Rows that stand together.

    Attributes:
        nbytes: what they take in their file, for the progress; 0 where that is unknown.
    """

    @property
    def nbytes(self) -> int: ...

    def rows(self) -> FoundRows:
        """The rows, as :func:`qsharded.data.records.find_rows` gives them."""


@dataclass(frozen=True)
class _Lines:
    path: Path
    start: int
    end: int
    number: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def rows(self) -> FoundRows:
        return json_lines(self.path, self.start, self.end, self.number)


@dataclass(frozen=True)
class _RowGroup:
    path: Path
    group: int
    number: int
    nbytes: int

    def rows(self) -> FoundRows:
        return parquet_rows(self.path, [self.group], self.number)


@dataclass(frozen=True)
class _Read:
    """Rows of a file that one process must read from its beginning."""

    given: Sequence[tuple[str, Row | ValueError]]
    nbytes: int = 0

    def rows(self) -> FoundRows:
        yield from self.given


def chunks(paths: Sequence[Path], split: str = "train") -> Iterator[Chunk]:
    """The rows of these files, in order; of a file that holds several splits, those of ``split``.

    Raises:
        ValueError: a file cannot be read.
    """
    for path in paths:
        check_not_empty(path)
        if has_lines(path):
            yield from _lines(path)
        elif suffix_of(path.name) == ".parquet":
            yield from _row_groups(path)
        else:
            yield from chunks_of(find_rows_in(path, split))


def _lines(path: Path) -> Iterator[Chunk]:
    start, number = 0, 1
    with path.open("rb") as file:
        while block := file.read(_BYTES):
            rest = b"" if block.endswith(b"\n") else _skip_line(file)
            yield _Lines(path, start, file.tell(), number)
            start, number = file.tell(), number + block.count(b"\n") + rest.count(b"\n")


def _skip_line(file: BinaryIO) -> bytes:
    """Go behind the line's end; the last part of it, for lines of any length are not held whole."""
    while len(part := file.readline(_BYTES)) == _BYTES and not part.endswith(b"\n"):
        pass
    return part


def _row_groups(path: Path) -> Iterator[Chunk]:
    number, counts = 1, row_groups(path)
    size = path.stat().st_size
    for group, count in enumerate(counts):
        yield _RowGroup(path, group, number, size * count // (sum(counts) or 1))
        number += count


def chunks_of(rows: FoundRows) -> Iterator[Chunk]:
    """Rows that this process reads."""
    while given := list(islice(rows, _ROWS)):
        yield _Read(given)
