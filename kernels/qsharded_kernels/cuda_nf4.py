"""NF4 on NVIDIA GPUs by the compiled library (csrc/cuda/): sm_80 and later.

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row.
The callers check what users pass; the assertions here guard raw memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, cuda, library


def quantize(weight_NK: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, P] and absmax fp32 [N, G] of a weight in fp32, bf16 or fp16 on the GPU.

    ``midpoints``: fp32 [15], the thresholds between the codebook's values, more than 1/15 apart. NaN and infinity show
    in absmax.
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
    ``absmax_map``: fp32 [256]. ``out``: [N, K] to write to, each row
    contiguous and 16-byte aligned.
    """
    tables = absmax_scales, absmax_offset, codebook, absmax_map
    codes_NP, absmax_NG, out = checks.prepare_dequantize(codes_NP, absmax_NG, *tables, out_dtype, out)
    cuda.call(
        "nf4_dequantize",
        *(codes_NP, *absmax_NG.shape),
        *(absmax_NG, absmax_NG.stride(0), absmax_scales, absmax_offset, absmax_map),
        *(codebook, out, out.stride(0), library.DTYPES[out_dtype]),
    )
    return out


MOST_PARTS = 4

Part = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float, int]
"""codes [n, P], absmax [n, G], absmax_scales and absmax_offset as :func:`dequantize` takes them; the adapter's B [n, r]
(fp32 or bf16) or None, its scale, and its first column among those behind the weights."""


def dequantize_parts(
    parts: Sequence[Part], codebook: Tensor, absmax_map: Tensor | None, out: Tensor, tail: int
) -> None:
    """Up to 4 weights of the same K into bf16 ``out`` [N, K + tail], one below the other, in one launch.

    The ``tail`` columns behind a weight's row, a multiple of 8, hold that row of scale * B in its own columns and zeros
    in the others. ``out``: rows in a run, each 16-byte aligned. All parts have absmax in 8 bits, or all in fp32.
    """
    array = (library.Part * len(parts))()
    for place, (codes, absmax, scales, offset, B, scale, column) in zip(array, parts, strict=True):
        assert codes.is_contiguous()
        assert absmax.stride(1) == 1
        place.codes, place.absmax, place.absmax_row_stride = codes.data_ptr(), absmax.data_ptr(), absmax.stride(0)
        if scales is not None and offset is not None:
            place.absmax_scales, place.absmax_offset = scales.data_ptr(), offset.data_ptr()
        place.rows, place.column, place.scale = codes.shape[0], column, scale
        if B is not None:
            assert B.is_contiguous()
            assert B.shape[0] == codes.shape[0]
            place.b, place.b_dtype, place.rank = B.data_ptr(), library.DTYPES[B.dtype], B.shape[1]
    G = parts[0][1].shape[1]
    assert out.dtype == torch.bfloat16
    assert out.stride(1) == 1
    cuda.call_on(
        out.get_device(),
        "nf4_dequantize_parts",
        *(array, len(parts), G, tail),
        *(None if absmax_map is None else absmax_map.data_ptr(), codebook.data_ptr()),
        *(out.data_ptr(), out.stride(0)),
    )
