"""x W^T on a 4-bit weight in Triton, for few rows of x; without a GPU under TRITON_INTERPRET=1.

    y[m, n] = sum over g of (absmax[n, g] * sum over k in g of x[m, k] * value[code[n, k]]) / factor (+ bias[n])

The codebook's values are rounded to x's dtype; fp32 accumulators are scaled by absmax once a block and row. Rounded as
it stands NF4's codebook would bias the sums, so callers multiply it by a ``factor`` before they round it.

A program has a tile of W's rows and a part of K, four blocks at a time:

    codes [TILE_N, 8 words a block] -> decoded in registers -> A of the tensor cores [TILE_N, 64]
    x     [TILE_M, 64]              -> shared memory        -> B of the tensor cores [64, TILE_M]
    accumulators [TILE_N, TILE_M] += absmax [TILE_N] * (A B)

W is the left operand, for that one has 16 rows an instruction and the other 8: few rows of x waste the least. The
values stay in the registers of the thread that read their codes: rows and columns are taken in the order in which the
tensor cores' lanes hold them (``triton_operand``). A version of Triton that lays them out otherwise gives the same
sums, by way of shared memory.

Axes: M = rows of x, N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row, S = parts of K.
The callers check what users pass; the assertions here guard raw memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .triton_decode import INTERPRETED, decode, tables
from .triton_operand import as_operand, column_order, row_order
from .triton_split_sums import add_parts, empty_partials, splits_to_fill
from .triton_tiles import LinearTile

BLOCK = tl.constexpr(checks.BLOCK)
WORDS = tl.constexpr(checks.BLOCK // 8)
ABSMAX_BLOCK = tl.constexpr(checks.ABSMAX_BLOCK)
AT_ONCE = tl.constexpr(4)  # blocks in a turn of the loop: as many absmax codes as a word holds
DTYPES = (torch.bfloat16, torch.float16)
MOST_ROWS = 64


def linear(
    x_MK: Tensor,
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    lookups: Tensor,
    factor: float,
    absmax_map: Tensor | None,
    bias_N: Tensor | None = None,
    *,
    tile: LinearTile,
    splits: int | None = None,
) -> Tensor:
    """y = x W^T (+ bias) [M, N] in x's dtype, bf16 or fp16, for at most ``MOST_ROWS`` rows of x.

    ``lookups``: of ``triton_decode.lookups``, for the codebook times ``factor`` in x's dtype. ``absmax_NG`` and what
    follows it: as in ``triton_nf4.dequantize``. ``bias_N``: of x's dtype, added in fp32. ``splits``: into how many
    parts K is cut at the least; None takes enough to fill the GPU. The same call gives the same bits.
    """
    (M, K), (N, G) = x_MK.shape, absmax_NG.shape
    assert 0 < M <= MOST_ROWS, M
    assert K == G * checks.BLOCK, (K, G)
    assert x_MK.dtype in DTYPES, x_MK.dtype
    dtype = x_MK.dtype
    x_MK = x_MK.contiguous()
    if INTERPRETED.value:  # numpy has no bf16; in fp32 the same products are exact
        x_MK, bias_N = x_MK.float(), None if bias_N is None else bias_N.float()
    codes_NP, absmax_NG = checks.readable(codes_NP, absmax_NG)
    checks.assert_packed(codes_NP, absmax_NG, absmax_scales, absmax_offset, absmax_map)
    y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    per_split = _blocks_per_split(N, G, tile, splits, x_MK.device)
    splits = triton.cdiv(G, per_split)
    partials_SMN = empty_partials(splits, M, N, x_MK.device) if splits > 1 else y_MN
    tables = absmax_scales, absmax_offset, absmax_map
    tile_m = max(8, triton.next_power_of_2(M))
    with torch.cuda.device_of(x_MK):
        linear_kernel[(triton.cdiv(N, tile.rows), splits)](
            *(x_MK, codes_NP.view(torch.int32)),
            *(absmax_NG, absmax_NG.stride(0), *(absmax_NG if table is None else table for table in tables)),
            *(lookups, y_MN if bias_N is None else bias_N.contiguous(), partials_SMN),
            *(M, N, G, per_split, 1 / factor),
            *(lookups, 0, 0),
            **constants(tile, tile_m, dtype, G),
            DOUBLE_QUANT=absmax_scales is not None,
            WRITES_Y=splits == 1,
            HAS_BIAS=bias_N is not None,
            GROUPED=False,
        )
        if splits > 1:
            add_parts(partials_SMN, y_MN, bias_N, 1 / factor)
    return y_MN.to(dtype)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def constants(tile: LinearTile, tile_m: int, dtype: torch.dtype, G: int) -> dict[str, Any]:
    """What the kernel is compiled for, of the tile and the sizes: G blocks in a row, x of ``dtype``."""
    return {
        "DTYPE": _TYPES[dtype],
        "DECODER": tile.decoder,
        "TILE_M": tile_m,
        "TILE_N": tile.rows,
        "WARPS": tile.warps,
        "RUN": _run(tile, tile_m),
        "WHOLE_TURNS": G % AT_ONCE.value == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _blocks_per_split(N: int, G: int, tile: LinearTile, splits: int | None, device: torch.device) -> int:
    """A multiple of ``AT_ONCE``, and at most as many as touch two of a row's second-level scales."""
    splits = splits or splits_to_fill(triton.cdiv(N, tile.rows), tile.programs_per_sm, device)
    per_split = triton.cdiv(triton.cdiv(G, splits), AT_ONCE.value) * AT_ONCE.value
    return min(per_split, checks.ABSMAX_BLOCK)


def _run(tile: LinearTile, tile_m: int) -> int:
    """How many of a row's values follow each other in a lane of the left operand, as Triton lays it out: 2 in
    ``wgmma``, which takes four warps, 64 rows and 16 columns, and 2 of what comes from ``tl.gather``; else 4."""
    wgmma = tile.warps % 4 == 0 and tile.rows >= 64 and tile_m >= 16
    return 2 if wgmma or tile.decoder == "gather" else 4


@triton.jit(do_not_specialize=["M", "blocks_per_split"])  # one compilation for all of them
def linear_kernel(
    x_ptr,
    words_ptr,
    absmax_ptr,
    absmax_row_stride,
    scales_ptr,
    offset_ptr,
    map_ptr,
    lookups_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    G,
    blocks_per_split,
    scale,
    groups_ptr,
    absmax_expert_stride,
    scales_expert_stride,
    DTYPE: tl.constexpr,
    DECODER: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WARPS: tl.constexpr,
    RUN: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    WHOLE_TURNS: tl.constexpr,
    WRITES_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    if GROUPED:  # the second axis counts pieces of groups (triton_grouped), and K is whole
        first, last = 0, G
        expert = tl.load(groups_ptr + tl.program_id(1) * 3).to(tl.int64)
        row = tl.load(groups_ptr + tl.program_id(1) * 3 + 1).to(tl.int64)
        M = tl.load(groups_ptr + tl.program_id(1) * 3 + 2)
        x_ptr += row * G * BLOCK
        out_ptr += row * N
        words_ptr += expert * N * G * WORDS
        absmax_ptr += expert * absmax_expert_stride
        scales_ptr += expert * scales_expert_stride
        offset_ptr += expert
    else:
        first = tl.program_id(1) * blocks_per_split
        last = tl.minimum(first + blocks_per_split, G)
    i_n, m = tl.arange(0, TILE_N), tl.arange(0, TILE_M)
    n = tl.program_id(0) * TILE_N + i_n
    # rows beyond the last are read as the last, and not written
    row_n = tl.minimum(n, N - 1).to(tl.int64)
    read_n = tl.minimum(tl.program_id(0) * TILE_N + row_order(i_n, WARPS), N - 1).to(tl.int64)
    word = tl.max_contiguous(tl.multiple_of(tl.arange(0, WORDS), 2), 2)  # a lane reads two
    words_nw_ptr = words_ptr + (read_n * G * WORDS)[:, None] + word[None, :]
    x_km_ptr = x_ptr + column_order(tl.arange(0, BLOCK), RUN)[:, None] + (tl.minimum(m, M - 1) * G * BLOCK)[None, :]
    absmax_n_ptr = absmax_ptr + row_n * absmax_row_stride
    scale_n, next_scale_n, until_n = _second_level(scales_ptr, row_n * G, first, N * G, DOUBLE_QUANT)
    decoding = tables(lookups_ptr, DECODER)
    acc_nm = tl.zeros((TILE_N, TILE_M), tl.float32)
    for start in range(first, last, AT_ONCE):
        block_b = start + tl.arange(0, AT_ONCE)
        absmax_nb = _load(absmax_n_ptr[:, None] + block_b[None, :], (block_b < last)[None, :], WHOLE_TURNS)
        if DOUBLE_QUANT:
            absmax_nb = tl.load(map_ptr + absmax_nb.to(tl.int32))
            absmax_nb *= tl.where(block_b[None, :] < until_n[:, None], scale_n[:, None], next_scale_n[:, None])
            absmax_nb += tl.load(offset_ptr)
        even_n2, odd_n2 = tl.split(absmax_nb.reshape(TILE_N, 2, 2))
        for b in tl.static_range(AT_ONCE):
            inside = start + b < last
            word_nw = _load(words_nw_ptr + (start + b) * WORDS, inside, WHOLE_TURNS)
            x_km = _load(x_km_ptr + (start + b) * BLOCK, inside, WHOLE_TURNS)
            value_nk = as_operand(decode(word_nw, decoding, DTYPE, DECODER), WARPS, RUN)
            first_n, second_n = tl.split(even_n2 if b % 2 == 0 else odd_n2)
            absmax_n = first_n if b < 2 else second_n
            acc_nm += tl.dot(value_nk, x_km, input_precision="ieee") * absmax_n[:, None]
    inside_nm = (n < N)[:, None] & (m < M)[None, :]
    if WRITES_Y:
        acc_nm *= scale
        if HAS_BIAS:
            acc_nm += tl.load(bias_ptr + row_n).to(tl.float32)[:, None]
        tl.store(out_ptr + m[None, :] * N + n[:, None], acc_nm.to(out_ptr.dtype.element_ty), mask=inside_nm)
    else:
        tl.store(out_ptr + (tl.program_id(1) * M + m).to(tl.int64)[None, :] * N + n[:, None], acc_nm, mask=inside_nm)


@triton.jit
def _load(ptr, inside, WHOLE_TURNS: tl.constexpr):
    """What lies there; 0 beyond the part's last block, which a whole number of turns does not reach."""
    if WHOLE_TURNS:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=inside, other=0)


@triton.jit
def _second_level(scales_ptr, row_start_n, first, absmax_values, DOUBLE_QUANT: tl.constexpr):
    """The scale of each row's absmax from block ``first`` on, the one after it, and the block where that begins."""
    if DOUBLE_QUANT:
        at_n = (row_start_n + first) // ABSMAX_BLOCK
        next_at_n = tl.minimum(at_n + 1, (absmax_values - 1) // ABSMAX_BLOCK)
        until_n = (at_n + 1) * ABSMAX_BLOCK - row_start_n
        return tl.load(scales_ptr + at_n), tl.load(scales_ptr + next_at_n), until_n.to(tl.int32)
    else:
        return row_start_n, row_start_n, row_start_n
