"""NF4's double quantization in Triton, for any GPU; without one under TRITON_INTERPRET=1.

The steps work on whole rows of a weight that ranks share, and give the bytes of ``qsharded.nf4``'s.
Axes: N = these rows, G = absmax values in a row; within a kernel R = rows of one program, V = values of one program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

ABSMAX_BLOCK = tl.constexpr(checks.ABSMAX_BLOCK)
ABSMAX_THRESHOLDS = tl.constexpr(checks.ABSMAX_THRESHOLDS)
SMALLEST_SCALE = tl.constexpr(1e-38)  # keeps the reciprocal finite in an all-zero block

_ROWS_PER_PROGRAM = 32


def absmax_row_sums(absmax_NG: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right."""
    absmax_NG = absmax_NG.contiguous()
    N, G = absmax_NG.shape
    sums_N = absmax_NG.new_empty(N, dtype=torch.float64)
    with torch.cuda.device_of(absmax_NG):  # Triton launches on the current device
        grid = (triton.cdiv(N, _ROWS_PER_PROGRAM),)
        _row_sums_kernel[grid](absmax_NG, sums_N, N, G, ROWS=_ROWS_PER_PROGRAM, num_warps=1)
    return sums_N


def absmax_scales(absmax_NG: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of abs(absmax - offset) in 256-blocks, as far as these rows, from
    ``first_row`` on of a weight of ``rows`` rows, reach; 0 for blocks they do not touch."""
    absmax_NG = absmax_NG.contiguous()
    G = absmax_NG.shape[1]
    maxima = absmax_NG.new_zeros(checks.second_level_blocks(rows * G))
    first, blocks = _second_level_blocks(absmax_NG, first_row)
    with torch.cuda.device_of(absmax_NG):
        _scales_kernel[(blocks,)](absmax_NG, first, absmax_NG.numel(), offset, maxima, num_warps=1)
    return maxima


def encode_absmax(absmax_NG: Tensor, scales: Tensor, offset: Tensor, thresholds: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's ``scales`` and ``offset``.

    ``thresholds``: fp32 [255], the midpoints between the second-level map's entries.
    """
    absmax_NG = absmax_NG.contiguous()
    checks.assert_absmax(absmax_NG, thresholds)
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    first, blocks = _second_level_blocks(absmax_NG, first_row)
    with torch.cuda.device_of(absmax_NG):
        _encode_kernel[(blocks,)](
            absmax_NG, first, absmax_NG.numel(), offset, scales, thresholds, codes_NG, num_warps=2
        )
    return codes_NG


def _second_level_blocks(absmax_NG: Tensor, first_row: int) -> tuple[int, int]:
    """Where these values begin in their weight, and how many second-level blocks they touch."""
    first = first_row * absmax_NG.shape[1]
    before = first // checks.ABSMAX_BLOCK
    return first, checks.second_level_blocks(first + absmax_NG.numel()) - before if absmax_NG.numel() else 0


@triton.jit
def _row_sums_kernel(absmax_ptr, sums_ptr, rows, columns, ROWS: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    sum_R = tl.zeros((ROWS,), tl.float64)
    for column in range(columns):
        sum_R += tl.load(absmax_ptr + row_R * columns + column, mask=inside_R, other=0).to(tl.float64)
    tl.store(sums_ptr + row_R, sum_R, mask=inside_R)


@triton.jit
def _own_values(absmax_ptr, first, count, offset_ptr):
    """One second-level block: its number, where its values lie among the given ones, which are given, and they."""
    block = first // ABSMAX_BLOCK + tl.program_id(0)
    at_V = block.to(tl.int64) * ABSMAX_BLOCK - first + tl.arange(0, ABSMAX_BLOCK)
    inside_V = (at_V >= 0) & (at_V < count)
    value_V = tl.load(absmax_ptr + at_V, mask=inside_V, other=0) - tl.load(offset_ptr)
    return block, at_V, inside_V, value_V


@triton.jit
def _scales_kernel(absmax_ptr, first, count, offset_ptr, scales_ptr):
    block, _, inside_V, value_V = _own_values(absmax_ptr, first, count, offset_ptr)
    tl.store(scales_ptr + block, tl.max(tl.where(inside_V, tl.abs(value_V), 0.0), axis=0))


@triton.jit
def _encode_kernel(absmax_ptr, first, count, offset_ptr, scales_ptr, thresholds_ptr, codes_ptr):
    block, at_V, inside_V, value_V = _own_values(absmax_ptr, first, count, offset_ptr)
    # tl.full, for Triton takes a literal as small as this for fp64
    divisor = tl.maximum(tl.load(scales_ptr + block), tl.full((), SMALLEST_SCALE, tl.float32))
    scaled_V = value_V * tl.div_rn(tl.full((), 1.0, tl.float32), divisor)
    # how many thresholds lie below, by halves of what is left of them
    code_V = tl.zeros(at_V.shape, tl.int32)
    for i in tl.static_range(8):
        half = 128 >> i
        below_V = tl.load(thresholds_ptr + code_V + (half - 1)) < scaled_V
        code_V += tl.where(below_V, half, 0)
    tl.store(codes_ptr + at_V, code_V.to(tl.uint8), mask=inside_V)
