"""What a batch says beside its tokens: which targets count, which positions are padding, where documents begin.

The data makes such batches and the model reads them; this is below both. Axes: B rows, S positions, N documents.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""The target of a position that is not trained on, as in torch's cross_entropy."""

PADDING = -1
"""The document id of a position that holds no token."""


@dataclass(frozen=True)
class Boundaries:
    """Where each document begins in the batch's rows laid end to end, padding being one more document.

    Attributes:
        starts: int32 [N + 1], ascending from 0 to B * S, where attention runs.
        longest: tokens of the longest document, or more.
        are_rows: every document is a whole row, known without looking at ``starts``.
    """

    starts: Tensor
    longest: int
    are_rows: bool = False

    @classmethod
    def of(cls, documents_BS: Tensor) -> "Boundaries":
        """Of document ids: neighbours of equal id in a row are one document. From a GPU's tensor it waits for it."""
        ids = documents_BS.cpu().numpy()
        starts = np.ones(ids.shape, dtype=bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        edges = np.append(np.flatnonzero(starts), ids.size)
        on_cpu = torch.from_numpy(edges.astype(np.int32))
        return cls(on_cpu.to(documents_BS.device), int(np.diff(edges).max(initial=1)))

    @classmethod
    def of_rows(cls, rows: int, length: int, device: torch.device) -> "Boundaries":
        """Of rows that are one document each."""
        return cls(torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device), length, True)

    def to(self, device: torch.device | str) -> "Boundaries":
        """The same on ``device``."""
        return replace(self, starts=self.starts.to(device, non_blocking=True))

    def pin_memory(self) -> "Boundaries":
        """The same in page-locked memory."""
        return replace(self, starts=self.starts.pin_memory())
