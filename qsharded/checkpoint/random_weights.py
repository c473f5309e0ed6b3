"""Random numbers in the shape of a model, in place of a checkpoint."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.checkpoint.row_chunks import RowChunk
from qsharded.utils.seeds import derived_seed


@dataclass(frozen=True)
class RandomWeights:
    """Normal weights (norms: ones) for a model's shape, the same for any number of ranks: rows are drawn in fixed runs.

    Attributes:
        seed: of the numbers.
        std: of the matrices.
        device: where they are drawn; two kinds of device draw different numbers.
    """

    seed: int
    std: float
    device: torch.device
    shapes: dict[str, tuple[int, ...]]

    _RUN = 1024

    def check(self, shapes: dict[str, tuple[int, ...]], packed: Iterable[str] = ()) -> None:
        """Take the shapes as they are."""
        self.shapes.update(shapes)

    def dtype(self, name: str) -> torch.dtype:
        """bf16."""
        return torch.bfloat16

    def rows_at_once(self, row_bytes: int) -> int:
        """A run: no number is drawn twice but at a shard's edges, and no more than a run is held."""
        return self._RUN

    def stream(self, chunks: Sequence[RowChunk], device: torch.device) -> Generator[Tensor, None, None]:
        """The bytes of each chunk in turn, uint8 on ``device``."""
        for chunk in chunks:
            yield self.rows(chunk.name, chunk.start, chunk.stop).to(device).view(torch.uint8)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor, bf16."""
        shape = self.shapes[name]
        if len(shape) == 1:
            fill = torch.ones if name.endswith("norm.weight") else torch.zeros
            return fill(stop - start, dtype=torch.bfloat16, device=self.device)
        first = start // self._RUN * self._RUN
        runs = [self._run(name, row, shape) for row in range(first, stop, self._RUN)]
        drawn = torch.cat(runs) if runs else torch.empty(0, shape[1], dtype=torch.bfloat16, device=self.device)
        return drawn[start - first : stop - first]

    def _run(self, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(derived_seed(self.seed, name, row))
        size = (min(self._RUN, shape[0] - row), *shape[1:])
        return torch.randn(size, generator=generator, device=self.device).mul_(self.std).bfloat16()
