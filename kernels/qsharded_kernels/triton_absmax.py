"""NF4's double quantization in Triton, for any GPU; without one under TRITON_INTERPRET=1.

The steps work on whole rows of a weight that ranks share, and give the bytes of ``qsharded.quant.formats``'s.
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

# A lane adds a row, whose additions wait for each other; its loads, so many at a time, need not.
_ROWS_PER_PROGRAM, _COLUMNS_AT_ONCE = 32, 16
_SUMS_AT_ONCE = 1024


def double_quantize(absmax_NG: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, G], scales fp32 [ceil(N*G/256)] and offset fp32 [] of a whole weight's absmax, fp32 [N, G].

    ``thresholds``: fp32 [255], the midpoints between the second-level map's entries.
    """
    absmax_NG = checks.prepare_absmax(absmax_NG)
    N, G = absmax_NG.shape
    offset = absmax_offset(absmax_row_sums(absmax_NG), G)
    scales = absmax_NG.new_empty(checks.second_level_blocks(N * G))
    checks.assert_second_level(absmax_NG, 0, scales, offset, thresholds)
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    _second_level(absmax_NG, 0, offset, scales, thresholds, codes_NG, find_scales=True)
    return codes_NG, scales, offset


def absmax_row_sums(absmax_NG: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right."""
    absmax_NG = checks.prepare_absmax(absmax_NG)
    N, G = absmax_NG.shape
    sums_N = absmax_NG.new_empty(N, dtype=torch.float64)
    with torch.cuda.device_of(absmax_NG):  # Triton launches on the current device
        _row_sums_kernel[(triton.cdiv(N, _ROWS_PER_PROGRAM),)](
            absmax_NG, sums_N, N, G, ROWS=_ROWS_PER_PROGRAM, COLUMNS=_COLUMNS_AT_ONCE, num_warps=1
        )
    return sums_N


def absmax_offset(row_sums_N: Tensor, G: int) -> Tensor:
    """fp32 []: the mean of a whole weight's absmax, from its row sums, none negative, added from first to last."""
    row_sums_N = checks.prepare_row_sums(row_sums_N)
    offset = row_sums_N.new_empty((), dtype=torch.float32)
    N = row_sums_N.numel()
    with torch.cuda.device_of(row_sums_N):
        _offset_kernel[(1,)](row_sums_N, N, N * G, offset, SUMS=_SUMS_AT_ONCE, num_warps=4)
    return offset


def absmax_scales(absmax_NG: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of abs(absmax - offset) in 256-blocks, as far as these rows, from
    ``first_row`` on of a weight of ``rows`` rows, reach; 0 for blocks they do not touch."""
    absmax_NG = checks.prepare_absmax(absmax_NG)
    N, G = absmax_NG.shape
    assert first_row + N <= rows, (first_row, N, rows)
    maxima = absmax_NG.new_zeros(checks.second_level_blocks(rows * G))
    _second_level(absmax_NG, first_row * G, offset, maxima, None, None, find_scales=True)
    return maxima


def encode_absmax(absmax_NG: Tensor, scales: Tensor, offset: Tensor, thresholds: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's ``scales`` and ``offset``."""
    absmax_NG = checks.prepare_absmax(absmax_NG)
    first = first_row * absmax_NG.shape[1]
    checks.assert_second_level(absmax_NG, first, scales, offset, thresholds)
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    _second_level(absmax_NG, first, offset, scales, thresholds, codes_NG, find_scales=False)
    return codes_NG


def _second_level(
    absmax_NG: Tensor,
    first: int,
    offset: Tensor,
    scales: Tensor,
    thresholds: Tensor | None,
    codes_NG: Tensor | None,
    *,
    find_scales: bool,
) -> None:
    """A program for each second-level block that these values, from value ``first`` of their weight on, touch."""
    count = absmax_NG.numel()
    blocks = checks.second_level_blocks(first + count) - first // checks.ABSMAX_BLOCK if count else 0
    with torch.cuda.device_of(absmax_NG):
        _second_level_kernel[(blocks,)](
            absmax_NG, first, count, offset, scales, thresholds, codes_NG, FIND_SCALE=find_scales, num_warps=2
        )


@triton.jit
def _row_sums_kernel(absmax_ptr, sums_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    sum_R = tl.zeros((ROWS,), tl.float64)
    for first in range(0, columns, COLUMNS):
        for i in tl.static_range(COLUMNS):
            inside = inside_R & (first + i < columns)
            # 0 changes no sum
            sum_R += tl.load(absmax_ptr + row_R * columns + first + i, mask=inside, other=0).to(tl.float64)
    tl.store(sums_ptr + row_R, sum_R, mask=inside_R)


@triton.jit
def _offset_kernel(sums_ptr, rows, values, offset_ptr, SUMS: tl.constexpr):
    """The sum in row order is one chain of dependent additions. Summed side by side first: no term is negative, so two
    orders differ by at most 2^-53 of the sum for every addition on the longest way of either, and where both ends of
    that interval give the same fp32, the order does not matter. One weight in thousands takes the chain."""
    i_S = tl.arange(0, SUMS)
    sum_S = tl.zeros((SUMS,), tl.float64)
    for first in range(0, rows, SUMS):
        sum_S += tl.load(sums_ptr + first + i_S, mask=first + i_S < rows, other=0)
    total = tl.sum(sum_S, axis=0)
    doubt = total * (2 * rows + 64) * 2.220446049250313e-16  # 2^-52: twice what the additions can err
    low, high = ((total - doubt) / values).to(tl.float32), ((total + doubt) / values).to(tl.float32)
    if low != high:
        total = tl.full((), 0, tl.float64)
        for row in range(rows):
            total += tl.load(sums_ptr + row)
        low = (total / values).to(tl.float32)
    tl.store(offset_ptr, low)


@triton.jit
def _second_level_kernel(
    absmax_ptr, first, count, offset_ptr, scales_ptr, thresholds_ptr, codes_ptr, FIND_SCALE: tl.constexpr
):
    block = first // ABSMAX_BLOCK + tl.program_id(0)
    at_V = block.to(tl.int64) * ABSMAX_BLOCK - first + tl.arange(0, ABSMAX_BLOCK)
    inside_V = (at_V >= 0) & (at_V < count)
    value_V = tl.load(absmax_ptr + at_V, mask=inside_V, other=0) - tl.load(offset_ptr)
    if FIND_SCALE:
        scale = tl.max(tl.where(inside_V, tl.abs(value_V), 0.0), axis=0)
        tl.store(scales_ptr + block, scale)
    else:
        scale = tl.load(scales_ptr + block)
    if codes_ptr is not None:
        tl.store(codes_ptr + at_V, _codes(value_V, scale, thresholds_ptr), mask=inside_V)


@triton.jit
def _codes(value_V, scale, thresholds_ptr):
    """How many thresholds lie below value * (1 / max(scale, 1e-38)), by halves of what is left of them."""
    # tl.full, for Triton takes a literal as small as this for fp64
    divisor = tl.maximum(scale, tl.full((), SMALLEST_SCALE, tl.float32))
    scaled_V = value_V * tl.div_rn(tl.full((), 1.0, tl.float32), divisor)
    code_V = tl.zeros(value_V.shape, tl.int32)
    for i in tl.static_range(8):
        half = 128 >> i
        below_V = tl.load(thresholds_ptr + code_V + (half - 1)) < scaled_V
        code_V += tl.where(below_V, half, 0)
    return code_V.to(tl.uint8)
