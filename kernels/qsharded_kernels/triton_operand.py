"""The order in which W's rows and columns are read, such that what a lane decodes is what the tensor cores ask it for.

Triton spreads a load of words [TILE_N, 8] over registers, lanes and warps in one way, and the left operand
[TILE_N, 64] of a product in another. Rows and columns of a product may be permuted, columns in both operands alike:
here they are, so that the two ways agree and converting one to the other moves nothing.
"""

import triton
import triton.language as tl

from . import checks

BLOCK = tl.constexpr(checks.BLOCK)


@triton.jit
def row_order(i_n, WARPS: tl.constexpr):
    """Which row of the tile is read i-th: of what a load spreads over lanes, warps and registers in this order, a warp
    has eight rows at a time, and of the left operand sixteen that follow each other."""
    lane, warp, half, turn = i_n % 8, i_n // 8 % WARPS, i_n // (8 * WARPS) % 2, i_n // (16 * WARPS)
    return ((turn * WARPS + warp) * 2 + half) * 8 + lane


@triton.jit
def column_order(k, RUN: tl.constexpr):
    """Which column of a block is multiplied k-th: a lane holds 16 columns, that is two words, of each row."""
    c, b, a = k % 2, k // 2 % 2 if RUN == 4 else k // 8 % 2, k // 16 % 2
    lane, word = (k // 4 if RUN == 4 else k // 2) % 4, k // 32
    return tl.max_contiguous(tl.multiple_of(lane * 16 + word * 8 + a * 4 + b * 2 + c, RUN), RUN)


@triton.jit
def as_operand(value, WARPS: tl.constexpr, RUN: tl.constexpr):
    """Decoded words [TILE_N, 8, 2, 2, 2] as the left operand [TILE_N, 64], in these orders."""
    TILE_N: tl.constexpr = value.shape[0]
    # turn, half, warp, row lane, column lane, word, a, b, c
    axes = value.reshape(TILE_N // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2, 2)
    if RUN == 4:
        return axes.permute(0, 2, 1, 3, 5, 6, 4, 7, 8).reshape(TILE_N, BLOCK)
    else:
        return axes.permute(0, 2, 1, 3, 5, 6, 7, 4, 8).reshape(TILE_N, BLOCK)
