"""Runs of rows, an expert's each, cut into pieces that a program of a kernel takes.

Axes: Q pieces.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ROWS, MOST_ROWS = 8, 64
"""Between which a piece's rows are, at the most that one has."""


class Pieces(NamedTuple):
    """Pieces of sorted rows.

    Attributes:
        table_Q3: int32, on the rows' device: expert, first row and how many rows; some may have none.
        most: that a piece may have: a power of two from 8 to 64.
    """

    table_Q3: Tensor
    most: int

    @classmethod
    def of(cls, groups: Sequence[tuple[int, int]], device: torch.device) -> "Pieces":
        """Of ``groups``, experts and how many rows each has, one behind the other."""
        most = rows_of_piece(max((rows for _, rows in groups), default=1))
        return cls(_on_device(tuple(groups), most, device), most)


def rows_of_piece(rows: float) -> int:
    """A power of two of at least so many, where there is one."""
    most = LEAST_ROWS
    while most < min(rows, MOST_ROWS):
        most *= 2
    return most


@lru_cache(maxsize=1)
def _on_device(groups: tuple[tuple[int, int], ...], most: int, device: torch.device) -> Tensor:
    """Brought to the device once for the projections of a layer, which follow each other."""
    return torch.tensor(list(_cut(groups, most)), dtype=torch.int32, device=device).view(-1, 3)


def _cut(groups: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int, int]]:
    first = 0
    for expert, rows in groups:
        for start in range(0, rows, most):
            yield expert, first + start, min(most, rows - start)
        first += rows
