"""Products of runs of rows, each with a matrix of its own: ``torch._grouped_mm`` where it serves, else a loop.

Axes: n groups, R rows of all groups behind each other, I and O columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

ALIGNED = 8
"""``torch._grouped_mm`` wants rows of whole 16 bytes: so many values of bf16."""


@dataclass(frozen=True)
class Groups:
    """How many rows each of n groups has, behind each other."""

    counts: Sequence[int]
    device: torch.device

    @cached_property
    def ends(self) -> Tensor:
        """int32 [n]: where each group ends, on the device: brought there once for all of their products."""
        return torch.tensor(list(accumulate(self.counts)), dtype=torch.int32, device=self.device)

    def __len__(self) -> int:
        return len(self.counts)

    def runs(self) -> list[tuple[int, int]]:
        """(start, stop) of each."""
        return list(pairwise([0, *accumulate(self.counts)]))


@dataclass(frozen=True)
class Ends:
    """Groups of which the device knows the ends, int32 [n], and the host does not."""

    ends: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    def runs(self) -> list[tuple[int, int]]:
        """(start, stop) of each; the host waits for them."""
        return list(pairwise([0, *self.ends.tolist()]))


def grouped_mm(x_RI: Tensor, matrices_nIO: Tensor, groups: Groups | Ends) -> Tensor:
    """[R, O]: the first group's rows of x times the first matrix, the next times the second, and so on."""
    if x_RI.is_meta:
        return x_RI.new_empty(x_RI.shape[0], matrices_nIO.shape[2])
    if has_kernel(x_RI):
        return torch._grouped_mm(x_RI, matrices_nIO, offs=groups.ends)
    out_RO = x_RI.new_empty(x_RI.shape[0], matrices_nIO.shape[2])
    for matrix_IO, (start, stop) in zip(matrices_nIO, groups.runs(), strict=True):
        torch.mm(x_RI[start:stop], matrix_IO, out=out_RO[start:stop])
    return out_RO


def grouped_outer(a_RI: Tensor, b_RO: Tensor, groups: Groups | Ends) -> Tensor:
    """[n, I, O]: of each group's rows a^T b."""
    if a_RI.is_meta:
        return a_RI.new_empty(len(groups), a_RI.shape[1], b_RO.shape[1])
    if has_kernel(a_RI):
        made_nIO = torch._grouped_mm(a_RI.contiguous().t(), b_RO.contiguous(), offs=groups.ends)
        return made_nIO if isinstance(groups, Groups) else _of_rows(made_nIO, groups.ends)
    return torch.stack([a_RI[start:stop].T @ b_RO[start:stop] for start, stop in groups.runs()])


def group_of_rows(groups: Groups | Ends, rows: int) -> Tensor:
    """int64 [rows]: the number of each row's group; the last one's for rows behind all."""
    ends_n = groups.ends
    return torch.searchsorted(ends_n, torch.arange(rows, device=ends_n.device), right=True).clamp_(max=len(ends_n) - 1)


def _of_rows(made_nIO: Tensor, ends_n: Tensor) -> Tensor:
    """0 for groups without rows, whatever a kernel leaves there."""
    has_rows_n = ends_n.diff(prepend=ends_n.new_zeros(1)) > 0
    return made_nIO.where(has_rows_n[:, None, None], 0)


def has_kernel(x: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes such rows."""
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")


def is_one_launch(x: Tensor) -> bool:
    """Whether products of such rows are one launch, of whose groups' ends the host need not know: where PyTorch has a
    kernel for the card, on others it reads them and loops."""
    return has_kernel(x) and (not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in (9, 10))
