"""Lists of numbers of many lengths as two arrays: rows of a batch as the numbers of their examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Row r is ``numbers[starts[r] : starts[r + 1]]``.

    Attributes:
        numbers: the rows, one behind the other.
        starts: one more than there are rows, from 0 to the length of ``numbers``.
    """

    numbers: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Numbers:
        return self.numbers[self.starts[row] : self.starts[row + 1]]

    def __iter__(self) -> Iterator[Numbers]:
        return map(self.__getitem__, range(len(self)))

    def sums(self, values: Numbers) -> Numbers:
        """Of each row, what ``values`` has for its numbers, summed up; no row is empty."""
        return np.add.reduceat(values[self.numbers], self.starts[:-1]) if len(self) else np.zeros(0, np.int64)

    def taken(self, order: Sequence[int] | Numbers) -> "Ragged":
        """These rows, in that order."""
        order = np.asarray(order, np.int64)
        lengths = np.diff(self.starts)[order]
        starts = _starts(lengths)
        at = np.arange(starts[-1]) + np.repeat(self.starts[order] - starts[:-1], lengths)
        return Ragged(self.numbers[at], starts)

    def replaced(self, inner: "Ragged") -> "Ragged":
        """Each number n of these rows replaced by row n of ``inner``."""
        found = inner.taken(self.numbers)
        return Ragged(found.numbers, found.starts[self.starts])

    @classmethod
    def by_row(cls, row_of: Numbers, numbers: Numbers) -> "Ragged":
        """``numbers`` in the rows that ``row_of`` has for them, in their order; no row between the others is empty."""
        order = np.argsort(row_of, kind="stable")
        return cls(numbers[order], _starts(np.bincount(row_of)))


def _starts(lengths: Numbers) -> Numbers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
