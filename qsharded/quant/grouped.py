"""Products of runs of rows, each with a matrix of its own: ``torch._grouped_mm`` where it serves, else a loop.

Axes: n groups, R rows of all groups behind each other, I and O columns.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

ALIGNED = 8
"""``torch._grouped_mm`` wants rows of whole 16 bytes: so many values of bf16."""


def grouped_mm(x_RI: Tensor, matrices_nIO: Tensor, counts: Sequence[int]) -> Tensor:
    """[R, O]: the first ``counts[0]`` rows of x times the first matrix, the next times the second, and so on."""
    if x_RI.is_meta:
        return x_RI.new_empty(x_RI.shape[0], matrices_nIO.shape[2])
    if _has_kernel(x_RI):
        return torch._grouped_mm(x_RI, matrices_nIO, offs=_ends(counts, x_RI.device))
    out_RO = x_RI.new_empty(x_RI.shape[0], matrices_nIO.shape[2])
    for matrix_IO, (start, stop) in zip(matrices_nIO, _runs(counts), strict=True):
        torch.mm(x_RI[start:stop], matrix_IO, out=out_RO[start:stop])
    return out_RO


def grouped_outer(a_RI: Tensor, b_RO: Tensor, counts: Sequence[int]) -> Tensor:
    """[n, I, O]: of each group's rows a^T b."""
    if a_RI.is_meta:
        return a_RI.new_empty(len(counts), a_RI.shape[1], b_RO.shape[1])
    if _has_kernel(a_RI):
        return torch._grouped_mm(a_RI.contiguous().t(), b_RO.contiguous(), offs=_ends(counts, a_RI.device))
    return torch.stack([a_RI[start:stop].T @ b_RO[start:stop] for start, stop in _runs(counts)])


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _runs(counts: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(counts)]))
