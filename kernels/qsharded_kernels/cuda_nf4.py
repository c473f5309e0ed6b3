"""NF4 on NVIDIA GPUs by the compiled library (csrc/cuda/): sm_80 and later.

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row.
The callers check what users pass; the assertions here guard raw memory.
"""

import torch
from torch import Tensor

from . import checks, cuda, library


def quantize(weight_NK: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, P] and absmax fp32 [N, G] of a weight in fp32, bf16 or fp16 on the GPU.

    ``midpoints``: fp32 [15], the thresholds between levels, more than 1/15 apart. NaN and infinity show in absmax.
    """
    weight_NK, codes_NP, absmax_NG = checks.prepare_quantize(weight_NK, midpoints)
    dtype = library.DTYPES[weight_NK.dtype]
    cuda.call("nf4_quantize", weight_NK, dtype, absmax_NG.numel(), midpoints, codes_NP, absmax_NG)
    return codes_NP, absmax_NG


def dequantize(
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    absmax_map: Tensor | None,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The weight [N, K] in ``out_dtype`` (fp32, bf16 or fp16): fp32 level * absmax, rounded once.

    ``absmax_NG``: uint8 codes, decoded as map[code] * scales[(n*G + g) // 256] + offset with every step rounded to
    fp32, or, with scales, offset and map None, fp32. Its rows may be strided.
    ``absmax_scales``: fp32 [ceil(N*G/256)]; ``absmax_offset``: fp32, one element; ``levels``: fp32 [16];
    ``absmax_map``: fp32 [256]. ``out``: contiguous [N, K] to write to, 16-byte aligned.
    """
    tables = absmax_scales, absmax_offset, levels, absmax_map
    codes_NP, absmax_NG, out = checks.prepare_dequantize(codes_NP, absmax_NG, *tables, out_dtype, out)
    cuda.call(
        "nf4_dequantize",
        *(codes_NP, *absmax_NG.shape),
        *(absmax_NG, absmax_NG.stride(0), absmax_scales, absmax_offset, absmax_map),
        *(levels, out, library.DTYPES[out_dtype]),
    )
    return out
