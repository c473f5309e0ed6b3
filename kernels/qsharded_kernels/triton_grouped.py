"""Products of few rows with the 4-bit weight of their expert, all experts in one launch, in Triton.

    y[r, n] = sum over k of x[r, k] * W[expert of r, n, k]

Rows that share an expert lie together, and are cut into pieces of at most TILE_M rows; a program has a piece and a tile
of W's rows. From there on it is ``triton_linear``'s kernel, of which this is another grid.

Axes: E experts, R = rows of x, N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row, S
second-level blocks of an expert, Q pieces.
"""

import torch
import triton
from torch import Tensor

from . import checks
from .triton_decode import INTERPRETED
from .triton_linear import DTYPES, MOST_ROWS, constants, linear_kernel
from .triton_tiles import LinearTile

MOST_BLOCKS = checks.ABSMAX_BLOCK
"""Of a row: a program follows it through two second-level scales at most."""


def serves(N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether :func:`grouped_linear` takes weights [N, K] and x of ``dtype``."""
    return dtype in DTYPES and N > 0 and 0 < K <= MOST_BLOCKS * checks.BLOCK


def grouped_linear(
    x_RK: Tensor,
    codes_ENP: Tensor,
    absmax_ENG: Tensor,
    absmax_scales_ES: Tensor | None,
    absmax_offset_E: Tensor | None,
    lookups: Tensor,
    factor: float,
    absmax_map: Tensor | None,
    pieces_Q3: Tensor,
    *,
    most: int,
    tile: LinearTile,
) -> Tensor:
    """y [R, N] in x's dtype, bf16 or fp16. The same call gives the same bits.

    ``pieces_Q3``: int32, expert, first row of x and how many rows, at most ``most``, a power of two from 8 to 64. Rows
    of no piece may come out as anything. The rest is as in ``triton_linear.linear``, an expert's behind the last's.
    """
    (R, K), (_, N, G) = x_RK.shape, absmax_ENG.shape
    assert K == G * checks.BLOCK, (K, G)
    assert 0 < G <= MOST_BLOCKS, G
    assert x_RK.dtype in DTYPES, x_RK.dtype
    assert 8 <= most <= MOST_ROWS, most
    assert most & (most - 1) == 0, most
    assert pieces_Q3.dtype == torch.int32, pieces_Q3.dtype
    assert pieces_Q3.is_contiguous()
    dtype = x_RK.dtype
    codes_ENP, absmax_ENG = codes_ENP.contiguous(), absmax_ENG if absmax_ENG.stride(2) == 1 else absmax_ENG.contiguous()
    x_RK = x_RK.contiguous()
    if INTERPRETED.value:  # as in triton_linear
        x_RK = x_RK.float()
    y_RN = torch.empty(R, N, dtype=x_RK.dtype, device=x_RK.device)
    if R == 0 or not len(pieces_Q3):
        return y_RN.to(dtype)
    tables = absmax_scales_ES, absmax_offset_E, absmax_map
    with torch.cuda.device_of(x_RK):
        linear_kernel[(triton.cdiv(N, tile.rows), len(pieces_Q3))](
            *(x_RK, codes_ENP.view(torch.int32)),
            *(absmax_ENG, absmax_ENG.stride(1), *(absmax_ENG if table is None else table for table in tables)),
            *(lookups, y_RN, y_RN),
            *(R, N, G, G, 1 / factor),
            *(pieces_Q3, absmax_ENG.stride(0), checks.second_level_blocks(N * G)),
            **constants(tile, most, dtype, G),
            DOUBLE_QUANT=absmax_scales_ES is not None,
            WRITES_Y=True,
            HAS_BIAS=False,
            GROUPED=True,
        )
    return y_RN.to(dtype)
