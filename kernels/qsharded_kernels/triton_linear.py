"""x W^T on a 4-bit weight in Triton, for few rows of x; without a GPU under TRITON_INTERPRET=1.

The weight's codes look up a codebook that is rounded to x's dtype; fp32 accumulators are scaled by absmax once for each
block and row. Rounded as it stands NF4's codebook would bias the sums, so callers multiply it by a ``factor`` before
they round it, and y is divided by that.

Axes: M = rows of x, N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row; within a kernel
m, n, k = a tile's share of M, N, K. The callers check what users pass; the assertions here guard raw memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

BLOCK = tl.constexpr(checks.BLOCK)
ABSMAX_BLOCK = tl.constexpr(checks.ABSMAX_BLOCK)
CODES = tl.constexpr(checks.CODES)
DTYPES = (torch.bfloat16, torch.float16)
MOST_ROWS = 16  # one tile of x: what tensor cores take at the least

_TILE_M, _TILE_N = 16, 64
_SUMMED_AT_ONCE = 256
_WARPS = 4
_INTERPRETED = triton.knobs.runtime.interpret  # as triton.jit found it


def linear(
    x_MK: Tensor,
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    rounded_codebook: Tensor,
    factor: float,
    absmax_map: Tensor | None,
    bias_N: Tensor | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """y = x W^T (+ bias) [M, N] in x's dtype, bf16 or fp16, for at most 16 rows of x.

    ``rounded_codebook``: x's dtype [16], the values times ``factor``. ``absmax_NG`` and what follows it: as in
    ``triton_nf4.dequantize``. ``bias_N``: of x's dtype, added in fp32. ``splits``: into how many parts K is cut, whose
    sums are added in their order; None takes enough to fill the GPU. The same call gives the same bits.
    """
    (M, K), (N, G) = x_MK.shape, absmax_NG.shape
    assert 0 < M <= MOST_ROWS, M
    assert K == G * checks.BLOCK, (K, G)
    assert x_MK.dtype in DTYPES, x_MK.dtype
    assert (rounded_codebook.dtype, rounded_codebook.shape) == (x_MK.dtype, (checks.CODES,)), rounded_codebook.dtype
    checks.assert_encoded(codes_NP, absmax_NG, absmax_scales, absmax_offset, rounded_codebook.float(), absmax_map)
    x_MK, codes_NP, dtype = x_MK.contiguous(), codes_NP.contiguous(), x_MK.dtype
    absmax_NG = absmax_NG if absmax_NG.stride(1) == 1 else absmax_NG.contiguous()
    if _INTERPRETED:  # numpy has no bf16; in fp32 the same products are exact
        x_MK, rounded_codebook = x_MK.float(), rounded_codebook.float()
    splits = min(splits or _splits(N, x_MK.device), G)
    partials_SMN = torch.empty(splits, M, N, dtype=torch.float32, device=x_MK.device)
    y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    tables = absmax_scales, absmax_offset, absmax_map
    with torch.cuda.device_of(x_MK):
        _partials_kernel[(triton.cdiv(N, _TILE_N), splits)](
            *(x_MK, codes_NP, absmax_NG, absmax_NG.stride(0)),
            *(absmax_NG if table is None else table for table in tables),
            *(rounded_codebook, partials_SMN, M, N, G, triton.cdiv(G, splits)),
            DOUBLE_QUANT=absmax_scales is not None,
            TILE_M=_TILE_M,
            TILE_N=_TILE_N,
            num_warps=_WARPS,
        )
        _sum_kernel[(triton.cdiv(N, _SUMMED_AT_ONCE), M)](
            *(partials_SMN, y_MN if bias_N is None else bias_N.to(y_MN.dtype), y_MN, M, N, splits, 1 / factor),
            HAS_BIAS=bias_N is not None,
            AT_ONCE=_SUMMED_AT_ONCE,
        )
    return y_MN.to(dtype)


def _splits(N: int, device: torch.device) -> int:
    """Twice as many programs as there are SMs: one waits for memory while another computes."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, 2 * sms // triton.cdiv(N, _TILE_N))


@triton.jit
def _partials_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    absmax_row_stride,
    scales_ptr,
    offset_ptr,
    map_ptr,
    codebook_ptr,
    partials_ptr,
    M,
    N,
    G,
    blocks_per_split,
    DOUBLE_QUANT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """A tile of W's rows over one of K's parts, block after block."""
    row_n = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    row_m, k = tl.arange(0, TILE_M), tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 2)
    codebook_C = tl.load(codebook_ptr + tl.arange(0, CODES))
    first = tl.program_id(1) * blocks_per_split
    sums_mn = tl.zeros((TILE_M, TILE_N), tl.float32)
    for block in range(first, tl.minimum(first + blocks_per_split, G)):
        at_n = row_n * G + block
        codes_nb = tl.load(codes_ptr + at_n[:, None] * (BLOCK // 2) + byte[None, :], mask=row_n[:, None] < N, other=0)
        codes_nb = codes_nb.to(tl.int32)
        code_nk = tl.join(codes_nb >> 4, codes_nb & 15).reshape(
            TILE_N * BLOCK
        )  # a byte's first code is its high nibble
        value_nk = tl.gather(codebook_C, code_nk, 0).reshape(TILE_N, BLOCK)
        x_mk = tl.load(x_ptr + (row_m[:, None] * G + block) * BLOCK + k[None, :], mask=row_m[:, None] < M, other=0)
        absmax_n = tl.load(absmax_ptr + row_n * absmax_row_stride + block, mask=row_n < N, other=0)
        if DOUBLE_QUANT:
            scale_n = tl.load(scales_ptr + at_n // ABSMAX_BLOCK, mask=row_n < N, other=0)
            absmax_n = tl.load(map_ptr + absmax_n.to(tl.int32)) * scale_n + tl.load(offset_ptr)
        sums_mn += tl.dot(x_mk, value_nk.trans(), input_precision="ieee") * absmax_n[None, :]
    at_mn = (tl.program_id(1) * M + row_m[:, None]) * N + row_n[None, :]
    tl.store(partials_ptr + at_mn, sums_mn, mask=(row_m[:, None] < M) & (row_n[None, :] < N))


@triton.jit
def _sum_kernel(partials_ptr, bias_ptr, y_ptr, M, N, splits, scale, HAS_BIAS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The parts' sums, from first to last."""
    row_n = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    m = tl.program_id(1)
    sum_n = tl.zeros((AT_ONCE,), tl.float32)
    for split in range(splits):
        sum_n += tl.load(partials_ptr + (split * M + m).to(tl.int64) * N + row_n, mask=row_n < N, other=0)
    sum_n *= scale
    if HAS_BIAS:
        sum_n += tl.load(bias_ptr + row_n, mask=row_n < N, other=0).to(tl.float32)
    tl.store(y_ptr + m * N + row_n, sum_n.to(y_ptr.dtype.element_ty), mask=row_n < N)
