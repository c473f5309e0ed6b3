"""NF4 on the CPU by the compiled library (csrc/cpu/).

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row.
The callers check what users pass; the assertions here guard raw memory.
"""

import torch
from torch import Tensor

from . import checks, cpu, library

ISA_NAMES = ("portable", "avx2", "avx512")


def quantize(
    weight_NK: Tensor, midpoints: Tensor, *, threads: int | None = None, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, P] and absmax fp32 [N, G] of a weight in fp32, bf16 or fp16.

    ``midpoints``: fp32 [15], the thresholds between the codebook's values, more than 1/15 apart. ``threads``: at most
    so many; None takes PyTorch's number. ``isa``: one of ``ISA_NAMES`` instead of the best. NaN and infinity show in
    absmax.

    Raises:
        ValueError: this machine lacks ``isa``.
    """
    weight_NK, codes_NP, absmax_NG = checks.prepare_quantize(weight_NK, midpoints)
    dtype = library.DTYPES[weight_NK.dtype]
    arguments = weight_NK, dtype, absmax_NG.numel(), midpoints, codes_NP, absmax_NG
    cpu.call("nf4_quantize", *arguments, _isa_number(isa), threads=threads)
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
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """The weight [N, K] in ``out_dtype``: fp32 value * absmax, rounded once.

    ``absmax_NG``: uint8 codes, decoded as map[code] * scales[(n*G + g) // 256] + offset with every step rounded to
    fp32, or, with scales, offset and map None, fp32. Its rows may be strided.
    ``absmax_scales``: fp32 [ceil(N*G/256)]; ``absmax_offset``: fp32, one element; ``codebook``: fp32 [16];
    ``absmax_map``: fp32 [256]. ``out``: contiguous [N, K] to write to, 16-byte aligned. ``threads`` and ``isa`` as in
    ``quantize``.

    Raises:
        ValueError: this machine lacks ``isa``.
    """
    tables = absmax_scales, absmax_offset, codebook, absmax_map
    codes_NP, absmax_NG, out = checks.prepare_dequantize(codes_NP, absmax_NG, *tables, out_dtype, out)
    assert out.is_contiguous()
    cpu.call(
        "nf4_dequantize",
        *(codes_NP, *absmax_NG.shape),
        *(absmax_NG, absmax_NG.stride(0), absmax_scales, absmax_offset, absmax_map),
        *(codebook, out, library.DTYPES[out_dtype], _isa_number(isa)),
        threads=threads,
    )
    return out


def _isa_number(isa: str | None) -> int:
    best = cpu.compiled().qsharded_cpu_isa()
    number = best if isa is None else ISA_NAMES.index(isa)
    if number > best:
        raise ValueError(f"this machine does not run {isa}; the best it has is {ISA_NAMES[best]}")
    return number
