"""Products of few rows with the 4-bit weight of their expert, all experts in one launch, in Triton.

    y[r, n] = sum over k of x[r, k] * W[expert of r, n, k]

Rows that share an expert lie together. Each such group is cut into pieces of TILE_M rows, and a program has a piece and
a tile of W's rows; from there on it is ``triton_linear``'s kernel, of which this is another grid.

Axes: E experts, R = rows of x, N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row, S
second-level blocks of an expert.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

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
    groups: Sequence[tuple[int, int]],
    *,
    tile: LinearTile,
) -> Tensor:
    """y [R, N] in x's dtype, bf16 or fp16. The same call gives the same bits.

    ``groups``: experts and how many rows each has; the first has the first rows, and so on to the last row. The rest is
    as in ``triton_linear.linear``, an expert's behind the last's.
    """
    (R, K), (E, N, G) = x_RK.shape, absmax_ENG.shape
    assert K == G * checks.BLOCK, (K, G)
    assert 0 < G <= MOST_BLOCKS, G
    assert x_RK.dtype in DTYPES, x_RK.dtype
    assert sum(rows for _, rows in groups) == R, (groups, R)
    assert all(0 <= expert < E for expert, _ in groups), (groups, E)
    dtype = x_RK.dtype
    codes_ENP, absmax_ENG = codes_ENP.contiguous(), absmax_ENG if absmax_ENG.stride(2) == 1 else absmax_ENG.contiguous()
    x_RK = x_RK.contiguous()
    if INTERPRETED.value:  # as in triton_linear
        x_RK = x_RK.float()
    y_RN = torch.empty(R, N, dtype=x_RK.dtype, device=x_RK.device)
    if R == 0:
        return y_RN.to(dtype)
    tile_m = max(8, min(MOST_ROWS, triton.next_power_of_2(max(rows for _, rows in groups))))
    pieces = _pieces_on(x_RK.device, tuple(groups), tile_m)
    tables = absmax_scales_ES, absmax_offset_E, absmax_map
    with torch.cuda.device_of(x_RK):
        linear_kernel[(triton.cdiv(N, tile.rows), len(pieces))](
            *(x_RK, codes_ENP.view(torch.int32)),
            *(absmax_ENG, absmax_ENG.stride(1), *(absmax_ENG if table is None else table for table in tables)),
            *(lookups, y_RN, y_RN),
            *(R, N, G, G, 1 / factor),
            *(pieces, absmax_ENG.stride(0), checks.second_level_blocks(N * G)),
            **constants(tile, tile_m, dtype, G),
            DOUBLE_QUANT=absmax_scales_ES is not None,
            WRITES_Y=True,
            HAS_BIAS=False,
            GROUPED=True,
        )
    return y_RN.to(dtype)


@lru_cache(maxsize=1)
def _pieces_on(device: torch.device, groups: tuple[tuple[int, int], ...], most: int) -> Tensor:
    """int32 [pieces, 3], brought to the device once for the projections of a layer, which follow each other."""
    return torch.tensor(list(_pieces(groups, most)), dtype=torch.int32, device=device)


def _pieces(groups: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and how many rows, at most so many."""
    first = 0
    for expert, rows in groups:
        for start in range(0, rows, most):
            yield expert, first + start, min(most, rows - start)
        first += rows
