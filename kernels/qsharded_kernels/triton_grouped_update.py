"""Narrow products of runs of rows, each with a matrix of its own, added to rows that are there, in Triton.

    y[r, o] += sum over i of x[r, i] * matrix[group of r, i, o]

This is how a low-rank update gets to its base's product: y is read and written once, and rounded once more. A program
finds its group by the groups' ends, so the host need not know them.

Axes: R rows of all groups behind each other, n groups, I columns of x, O of y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_decode import INTERPRETED

MOST_COLUMNS = 64
"""Of x: it is held whole."""
MOST_GROUPS = 1024
_ROWS, _COLUMNS = 64, 128


def adds(groups: int, width: int) -> bool:
    """Whether :func:`add_` is for so many groups and columns of x."""
    return 0 < width <= MOST_COLUMNS and groups <= MOST_GROUPS


def add_(y_RO: Tensor, x_RI: Tensor, matrices_nIO: Tensor, ends_n: Tensor) -> None:
    """``ends_n``: int32, where each group's rows end; rows behind the last are left alone."""
    (R, columns), (n, width, _) = y_RO.shape, matrices_nIO.shape
    assert y_RO.is_contiguous()
    assert x_RI.is_contiguous()
    assert adds(n, width), (n, width)
    if not y_RO.numel():
        return
    if INTERPRETED.value and y_RO.dtype == torch.bfloat16:  # numpy has none
        wide_RO = y_RO.float()
        add_(wide_RO, x_RI.float(), matrices_nIO.float(), ends_n)
        y_RO.copy_(wide_RO)
        return
    with torch.cuda.device_of(y_RO):
        _add_kernel[(triton.cdiv(R, _ROWS) + n, triton.cdiv(columns, _COLUMNS))](
            *(y_RO, x_RI, matrices_nIO, ends_n),
            *(n, columns, width),
            *matrices_nIO.stride(),
            GROUPS=triton.next_power_of_2(n),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            WIDTH=max(16, triton.next_power_of_2(width)),
        )


@triton.jit
def _add_kernel(
    y_ptr,
    x_ptr,
    matrices_ptr,
    ends_ptr,
    n,
    columns,
    width,
    group_stride,
    i_stride,
    o_stride,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    g = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + g, mask=g < n, other=0)
    starts = tl.load(ends_ptr + g - 1, mask=(g > 0) & (g < n), other=0)
    pieces = (tl.where(g < n, ends - starts, 0) + ROWS - 1) // ROWS
    behind = tl.cumsum(pieces, 0)
    piece = tl.program_id(0)
    group = tl.sum(((behind <= piece) & (g < n)).to(tl.int32), 0)
    if group >= n:
        return
    is_own = g == group
    first = tl.sum(tl.where(is_own, starts, 0), 0) + (piece - tl.sum(tl.where(is_own, behind - pieces, 0), 0)) * ROWS
    row = first + tl.arange(0, ROWS)
    is_row = row < tl.sum(tl.where(is_own, ends, 0), 0)
    i, o = tl.arange(0, WIDTH), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide_row = row.to(tl.int64)
    x = tl.load(x_ptr + wide_row[:, None] * width + i[None, :], mask=is_row[:, None] & (i < width)[None, :], other=0.0)
    matrix_ptr = matrices_ptr + group.to(tl.int64) * group_stride
    matrix_ptr += i.to(tl.int64)[:, None] * i_stride + o.to(tl.int64)[None, :] * o_stride
    matrix = tl.load(matrix_ptr, mask=(i < width)[:, None] & (o < columns)[None, :], other=0.0)
    at = y_ptr + wide_row[:, None] * columns + o[None, :]
    inside = is_row[:, None] & (o < columns)[None, :]
    sums = tl.load(at, mask=inside, other=0.0).to(tl.float32) + tl.dot(x, matrix, input_precision="ieee")
    tl.store(at, sums.to(y_ptr.dtype.element_ty), mask=inside)
