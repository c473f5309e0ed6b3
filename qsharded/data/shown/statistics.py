"""How many tokens the rows of a dataset have, and how many of them are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsharded.data.examples import Example
from qsharded.data.facts import lengths_of, trained_of

_BINS = 8


@dataclass(frozen=True)
class Bin:
    """Rows of ``least`` to ``most`` tokens: ``rows`` of them."""

    least: int
    most: int
    rows: int


@dataclass(frozen=True)
class Statistics:
    """Of a dataset's examples.

    Attributes:
        lengths: [N], in tokens.
        trained: [N], how many of them count in the loss.
    """

    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Statistics":
        """Of ``examples``, of which there is one at least."""
        return cls(lengths_of(examples), trained_of(examples))

    def line(self) -> str:
        """The numbers in words."""
        tokens, trained = int(self.lengths.sum()), int(self.trained.sum())
        return (
            f"{tokens:,} tokens, {trained:,} of them trained ({trained / tokens:.1%}); a row has "
            f"{self.lengths.min():,} to {self.lengths.max():,}, the median is {int(np.median(self.lengths)):,}"
        )

    def histogram(self) -> list[Bin]:
        """The rows by length, from the shortest to the longest, in bins of one width."""
        least, most = int(self.lengths.min()), int(self.lengths.max())
        width = -(-(most + 1 - least) // _BINS)
        counts = np.bincount((self.lengths - least) // width).tolist()
        firsts = range(least, most + 1, width)
        return [Bin(first, first + width - 1, rows) for first, rows in zip(firsts, counts, strict=True)]
