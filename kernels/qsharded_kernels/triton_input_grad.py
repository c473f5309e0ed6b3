"""dy W on a 4-bit weight in Triton, for few rows of dy; without a GPU under TRITON_INTERPRET=1.

    dx[m, k] = sum over n of dy[m, n] * round(absmax[n, k / 64] * codebook[code[n, k]])

Here absmax differs along the sum, so that accumulators cannot be scaled by it: each weight is decoded to the bits that
dequantizing gives, and dy meets what it would meet there.

A program has a tile of W's columns and a part of its rows: codes [TILE_N, TILE_K] -> decoded -> right operand of the
tensor cores; dy [TILE_M, TILE_N] is the left one.

Axes: M = rows of dy, N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row, S = parts of N;
within a kernel g, w = a tile's blocks, and words in a block.
The callers check what users pass; the assertions here guard raw memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .triton_decode import INTERPRETED, codes_of
from .triton_split_sums import add_parts, empty_partials, splits_to_fill
from .triton_tiles import InputGradTile

BLOCK = tl.constexpr(checks.BLOCK)
WORDS = tl.constexpr(checks.BLOCK // 8)
ABSMAX_BLOCK = tl.constexpr(checks.ABSMAX_BLOCK)
CODES = tl.constexpr(checks.CODES)
DTYPES = (torch.bfloat16, torch.float16)
MOST_ROWS = 64


def input_grad(
    grad_MN: Tensor,
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    codebook: Tensor,
    absmax_map: Tensor | None,
    *,
    tile: InputGradTile,
    splits: int | None = None,
) -> Tensor:
    """dx = dy W [M, K] in dy's dtype, bf16 or fp16, for at most ``MOST_ROWS`` rows of dy; the rest as in
    ``triton_nf4.dequantize``. ``splits``: into how many parts N is cut; None takes enough to fill the GPU. The same
    call gives the same bits."""
    (M, N), G = grad_MN.shape, absmax_NG.shape[1]
    assert 0 < M <= MOST_ROWS, M
    assert grad_MN.dtype in DTYPES, grad_MN.dtype
    assert absmax_NG.shape[0] == N, (absmax_NG.shape, grad_MN.shape)
    dtype = grad_MN.dtype
    grad_MN = grad_MN.contiguous()
    if INTERPRETED.value:  # numpy has no bf16; in fp32 the same products are exact
        grad_MN = grad_MN.float()
    codes_NP, absmax_NG = checks.readable(codes_NP, absmax_NG)
    checks.assert_encoded(codes_NP, absmax_NG, absmax_scales, absmax_offset, codebook, absmax_map)
    tiles = triton.cdiv(G, tile.blocks)
    splits = splits or splits_to_fill(tiles, tile.programs_per_sm, grad_MN.device)
    per_split = triton.cdiv(triton.cdiv(N, splits), tile.rows) * tile.rows
    splits = triton.cdiv(N, per_split)
    grad_x_MK = torch.empty(M, G * checks.BLOCK, dtype=grad_MN.dtype, device=grad_MN.device)
    out = empty_partials(splits, M, G * checks.BLOCK, grad_MN.device) if splits > 1 else grad_x_MK
    tables = absmax_scales, absmax_offset, absmax_map
    with torch.cuda.device_of(grad_MN):
        _input_grad_kernel[(tiles, splits)](
            *(grad_MN, codes_NP.view(torch.int32), absmax_NG, absmax_NG.stride(0)),
            *(absmax_NG if table is None else table for table in tables),
            *(codebook, out, M, N, G, per_split),
            DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
            TILE_M=max(16, triton.next_power_of_2(M)),
            TILE_N=tile.rows,
            BLOCKS=tile.blocks,
            DOUBLE_QUANT=absmax_scales is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,  # the format rounds absmax twice
        )
        if splits > 1:
            add_parts(out, grad_x_MK, None, 1.0)
    return grad_x_MK.to(dtype)


@triton.jit(do_not_specialize=["M", "rows_per_split"])  # one compilation for all of them
def _input_grad_kernel(
    grad_ptr,
    words_ptr,
    absmax_ptr,
    absmax_row_stride,
    scales_ptr,
    offset_ptr,
    map_ptr,
    codebook_ptr,
    out_ptr,
    M,
    N,
    G,
    rows_per_split,
    DTYPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    m, i_n = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    g = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    word = tl.program_id(0) * (BLOCKS * WORDS) + tl.arange(0, BLOCKS * WORDS)
    g_is_inside, word_is_inside = (g < G)[None, :], (word < G * WORDS)[None, :]
    codebook_C = tl.load(codebook_ptr + tl.arange(0, CODES))
    acc_mk = tl.zeros((TILE_M, BLOCKS * BLOCK), tl.float32)
    for start in range(first, last, TILE_N):
        n = start + i_n
        row_n = tl.minimum(n, N - 1).to(tl.int64)  # rows beyond the last meet zeros of dy
        word_nw = tl.load(words_ptr + (row_n * (G * WORDS))[:, None] + word[None, :], mask=word_is_inside, other=0)
        absmax_ng = tl.load(absmax_ptr + (row_n * absmax_row_stride)[:, None] + g[None, :], mask=g_is_inside, other=0)
        if DOUBLE_QUANT:
            at_ng = (row_n[:, None] * G + g[None, :]) // ABSMAX_BLOCK
            scale_ng = tl.load(scales_ptr + at_ng, mask=g_is_inside, other=0)
            absmax_ng = tl.load(map_ptr + absmax_ng.to(tl.int32)) * scale_ng + tl.load(offset_ptr)
        grad_mn = tl.load(
            grad_ptr + (m * N)[:, None] + n[None, :], mask=(m < M)[:, None] & (n < last)[None, :], other=0
        )
        value = tl.gather(codebook_C, codes_of(word_nw).reshape(TILE_N * BLOCKS * BLOCK), 0)
        weight = value.reshape(TILE_N, BLOCKS, BLOCK) * absmax_ng[:, :, None]
        weight_nk = _rounded(weight, DTYPE).reshape(TILE_N, BLOCKS * BLOCK)
        acc_mk = tl.dot(grad_mn, weight_nk, acc_mk, input_precision="ieee")
    k = tl.program_id(0) * BLOCKS * BLOCK + tl.arange(0, BLOCKS * BLOCK)
    out_mk_ptr = out_ptr + ((tl.program_id(1) * M + m).to(tl.int64) * G * BLOCK)[:, None] + k[None, :]
    tl.store(out_mk_ptr, acc_mk.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < G * BLOCK)[None, :])


@triton.jit
def _rounded(weight, DTYPE: tl.constexpr):
    """In ``DTYPE``; while numpy interprets, which truncates to bf16, in fp32 of as many bits."""
    if not INTERPRETED:
        return weight.to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        bits = weight.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return weight.to(tl.float16).to(tl.float32)
