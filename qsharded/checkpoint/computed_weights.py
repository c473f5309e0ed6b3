"""Weights that no safetensors file holds as they are, made one by one when they are asked for."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.checkpoint.row_chunks import RowChunk


@dataclass(frozen=True)
class ComputedWeights:
    """A ``WeightSource`` whose tensors ``read`` gives by name, each whole, in fp32 on the CPU."""

    read: Callable[[str], Tensor]

    def check(self, shapes: dict[str, tuple[int, ...]], packed: Iterable[str] = ()) -> None:
        """Nothing is known of them before they are asked for."""

    def dtype(self, name: str) -> torch.dtype:
        """Of all of them."""
        return torch.float32

    def rows_at_once(self, row_bytes: int) -> int:
        """All."""
        return 1 << 60

    def stream(self, chunks: Sequence[RowChunk], device: torch.device) -> Generator[Tensor, None, None]:
        """As ``WeightSource`` says."""
        for chunk in chunks:
            rows = self.read(chunk.name)[chunk.start : chunk.stop].contiguous()
            yield rows.flatten().view(torch.uint8).to(device)
