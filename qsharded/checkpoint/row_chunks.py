"""Tensors cut into runs of rows, and what hands them out."""

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowChunk:
    """Rows [start, stop) of a tensor, of ``row_bytes`` each as it is stored."""

    name: str
    start: int
    stop: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.row_bytes


class WeightSource(Protocol):
    """Named tensors of which any run of rows can be had alone."""

    def check(self, shapes: dict[str, tuple[int, ...]], packed: Iterable[str] = ()) -> None:
        """Raise ValueError unless the tensors are just these, of these shapes, and ``packed`` ones of whatever form."""

    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is stored in."""

    def rows_at_once(self, row_bytes: int) -> int:
        """How many rows a chunk should have; chunks begin at multiples of it."""

    def stream(self, chunks: Sequence[RowChunk], device: torch.device) -> Generator[Tensor, None, None]:
        """The bytes of each chunk in turn, uint8 on ``device``, good until the next is asked for."""


def row_chunks_of(source: WeightSource, name: str, start: int, stop: int, row_bytes: int) -> list[RowChunk]:
    """Rows [start, stop) cut as ``source`` wants them."""
    step = source.rows_at_once(row_bytes)
    cuts = [start, *range(start // step * step + step, stop, step), stop]
    return [RowChunk(name, a, b, row_bytes) for a, b in itertools.pairwise(cuts) if a < b]
