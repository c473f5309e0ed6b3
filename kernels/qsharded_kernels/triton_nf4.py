"""NF4 in Triton, for any GPU; without one under TRITON_INTERPRET=1.

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row; within a kernel B = blocks of
one program, W = weights in a block, Q = 32-bit words of codes of one program, E = weights in such a word.
The callers check what users pass; the assertions here guard raw memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

BLOCK = tl.constexpr(checks.BLOCK)
ABSMAX_BLOCK = tl.constexpr(checks.ABSMAX_BLOCK)
MIDPOINTS = tl.constexpr(checks.MIDPOINTS)
CODES = tl.constexpr(checks.CODES)
CODES_PER_WORD = tl.constexpr(8)
WORDS = tl.constexpr(checks.BLOCK // 8)
SMALLEST_ABSMAX = tl.constexpr(1e-38)  # keeps the reciprocal finite in an all-zero block
BINS = tl.constexpr(32)  # of [-1, 1], narrower than two midpoints are apart

# 4,096 weights, 32 a thread: enough loads in flight to hide memory's latency
_QUANTIZE_BLOCKS, _DEQUANTIZE_BLOCKS = 64, 64
_WARPS = 4
_INTERPRETED = triton.knobs.runtime.interpret  # as triton.jit found it


def quantize(weight_NK: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, P] and absmax fp32 [N, G] of a weight in fp32, bf16 or fp16 on the GPU.

    code = how many ``midpoints`` (fp32 [15]) lie below weight * (1 / max(absmax, 1e-38)). NaN and infinity show in
    absmax.
    """
    weight_NK, codes_NP, absmax_NG = checks.prepare_quantize(weight_NK, midpoints)
    with torch.cuda.device_of(weight_NK):  # Triton launches on the current device
        _quantize_kernel[(triton.cdiv(absmax_NG.numel(), _QUANTIZE_BLOCKS),)](
            _bits_of_bf16(weight_NK),
            midpoints,
            codes_NP,
            absmax_NG,
            absmax_NG.numel(),
            BLOCKS=_QUANTIZE_BLOCKS,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # a scaled weight is rounded before it is held against a midpoint
        )
    return codes_NP, absmax_NG


def dequantize(
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    codebook: Tensor,
    absmax_map: Tensor | None,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The weight [N, K] in ``out_dtype`` (fp32, bf16 or fp16): fp32 value * absmax, rounded once.

    ``absmax_NG``: uint8 codes, decoded as map[code] * scales[(n*G + g) // 256] + offset with every step rounded to
    fp32, or, with scales, offset and map None, fp32. Its rows may be strided.
    ``absmax_scales``: fp32 [ceil(N*G/256)]; ``absmax_offset``: fp32, one element; ``codebook``: fp32 [16];
    ``absmax_map``: fp32 [256]. ``out``: contiguous [N, K] to write to, 16-byte aligned.
    """
    tables = absmax_scales, absmax_offset, codebook, absmax_map
    codes_NP, absmax_NG, out = checks.prepare_dequantize(codes_NP, absmax_NG, *tables, out_dtype, out)
    assert out.is_contiguous()
    N, G = absmax_NG.shape
    with torch.cuda.device_of(codes_NP):
        _dequantize_kernel[(triton.cdiv(N * G, _DEQUANTIZE_BLOCKS),)](
            codes_NP.view(torch.int32),
            absmax_NG,
            absmax_NG.stride(0),
            absmax_scales,
            absmax_offset,
            absmax_map,
            codebook,
            _bits_of_bf16(out),
            N * G,
            G,
            DOUBLE_QUANT=absmax_scales is not None,
            BLOCKS=_DEQUANTIZE_BLOCKS,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # a fused multiply-add would round absmax once, the format rounds it twice
        )
    return out


def _bits_of_bf16(tensor: Tensor) -> Tensor:
    """For the interpreter, which truncates to bf16, bf16 as int16, which the kernels round by integers."""
    return tensor.view(torch.int16) if _INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def _quantize_kernel(weight_ptr, midpoints_ptr, codes_ptr, absmax_ptr, blocks, BLOCKS: tl.constexpr):
    block_B = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    weight_at_BW = block_B[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight_BW = _to_fp32(tl.load(weight_ptr + weight_at_BW, mask=block_B[:, None] < blocks, other=0))
    absmax_B = _largest_magnitude(weight_BW)
    tl.store(absmax_ptr + block_B, absmax_B, mask=block_B < blocks)
    code_BW = _nearest_codes(weight_BW * _reciprocal(absmax_B)[:, None], midpoints_ptr)
    first_BP, second_BP = tl.split(code_BW.reshape(BLOCKS, BLOCK // 2, 2))
    byte_at_BP = block_B[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte_BP = ((first_BP << 4) | second_BP).to(tl.uint8)
    tl.store(codes_ptr + byte_at_BP, byte_BP, mask=block_B[:, None] < blocks)


@triton.jit
def _largest_magnitude(weight_BW):
    """max(abs()) over each row. Without their sign bits floats order as integers do, and NaN is the largest."""
    magnitude_BW = weight_BW.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude_BW, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(absmax_B):
    # tl.full, for Triton takes a literal as small as this for fp64
    divisor_B = tl.maximum(absmax_B, tl.full(absmax_B.shape, SMALLEST_ABSMAX, tl.float32))
    return tl.div_rn(tl.full(absmax_B.shape, 1.0, tl.float32), divisor_B)


@triton.jit
def _nearest_codes(scaled_BW, midpoints_ptr):
    """How many midpoints lie below each value: the index of the nearest value, a tie going down.

    [-1, 1] is cut into bins that hold one midpoint at most: a bin's look-up and one comparison end the search.
    """
    i_M = tl.arange(0, CODES)
    midpoint_M = tl.load(midpoints_ptr + i_M, mask=i_M < MIDPOINTS, other=0)
    bin_M = tl.where(i_M < MIDPOINTS, _bins(midpoint_M), BINS)
    bin_S = tl.arange(0, BINS)
    midpoint_S = tl.min(tl.where(bin_M[None, :] == bin_S[:, None], midpoint_M[None, :], float("inf")), axis=1)
    below_S = tl.sum((bin_M[None, :] < bin_S[:, None]).to(tl.int32), axis=1)
    scaled_V = scaled_BW.reshape(scaled_BW.numel)
    bin_V = _bins(scaled_V)
    # the sign of a difference is exact
    left_V = tl.gather(midpoint_S, bin_V, 0) - scaled_V
    code_V = tl.gather(below_S, bin_V, 0) + (left_V.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    return code_V.reshape(scaled_BW.shape)


@triton.jit
def _bins(scaled):
    """0 to 31, never falling as ``scaled`` grows. NaN has a bin too."""
    # beside 2^23 a float's last bit is 1
    return (tl.fma(scaled, 62.0, 8388670.0).to(tl.int32, bitcast=True) & 124) >> 2


@triton.jit
def _dequantize_kernel(
    words_ptr,
    absmax_ptr,
    absmax_row_stride,
    scales_ptr,
    offset_ptr,
    map_ptr,
    codebook_ptr,
    out_ptr,
    blocks,
    blocks_per_row,
    DOUBLE_QUANT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    i_Q = tl.arange(0, BLOCKS * WORDS)
    inside_Q = first_block + i_Q // WORDS < blocks
    # A word a load: a thread that loaded several would keep their weights, and its 16-byte stores would lie apart. To
    # Triton, addresses that do not follow each other are that.
    word_Q = tl.load(words_ptr + first_block * WORDS + tl.max_contiguous(i_Q, 1), mask=inside_Q, other=0)
    # one 64-bit division a program; within it 32 bits do
    column_Q = (first_block % blocks_per_row).to(tl.int32) + i_Q // WORDS
    row_Q = first_block // blocks_per_row + column_Q // blocks_per_row
    absmax_Q = tl.load(absmax_ptr + row_Q * absmax_row_stride + column_Q % blocks_per_row, mask=inside_Q, other=0)
    if DOUBLE_QUANT:
        scale_Q = tl.load(scales_ptr + (first_block + i_Q // WORDS) // ABSMAX_BLOCK, mask=inside_Q, other=0)
        absmax_Q = tl.load(map_ptr + absmax_Q.to(tl.int32)) * scale_Q + tl.load(offset_ptr)
    i_E = tl.arange(0, CODES_PER_WORD)
    shift_E = 4 * (i_E ^ 1)  # a byte's first code is its high nibble
    code_QE = (word_Q[:, None] >> shift_E[None, :]) & 15
    # from shared memory, where look-ups of 16 entries meet no conflict
    value_V = tl.gather(tl.load(codebook_ptr + tl.arange(0, CODES)), code_QE.reshape(code_QE.numel), 0)
    value_QE = _from_fp32(value_V.reshape(code_QE.shape) * absmax_Q[:, None], out_ptr.dtype.element_ty)
    value_at_QE = i_Q[:, None] * CODES_PER_WORD + i_E[None, :]
    tl.store(out_ptr + first_block * BLOCK + value_at_QE, value_QE, mask=inside_Q[:, None])


@triton.jit
def _to_fp32(value):
    """``value`` in fp32; int16 holds bf16's bits."""
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _from_fp32(value, dtype: tl.constexpr):
    """``value`` rounded to ``dtype``, nearest even; int16 receives bf16's bits."""
    if dtype == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return value.to(dtype)
