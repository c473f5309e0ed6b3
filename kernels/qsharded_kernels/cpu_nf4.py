"""NF4 on the CPU by the compiled library (csrc/cpu/).

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row.
The callers check what users pass; the assertions here guard raw memory.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from . import checks, library

ISA_NAMES = ("portable", "avx2", "avx512")


def is_available() -> bool:
    """Whether the compiled library was built."""
    return library.load() is not None


def best_isa() -> str:
    """The best of ``ISA_NAMES`` that this machine runs."""
    return ISA_NAMES[_library().qsharded_cpu_isa()]


def quantize(
    weight_NK: Tensor, midpoints: Tensor, *, threads: int | None = None, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, P] and absmax fp32 [N, G] of a weight in fp32, bf16 or fp16.

    ``midpoints``: fp32 [15], the thresholds between levels. ``threads``: at most so many; None takes PyTorch's
    number. ``isa``: one of ``ISA_NAMES`` instead of the best. NaN and infinity show in absmax.

    Raises:
        ValueError: this machine lacks ``isa``.
    """
    weight_NK = weight_NK.contiguous()
    N, K = weight_NK.shape
    checks.assert_weight(weight_NK, midpoints)
    codes_NP = torch.empty(N, K // 2, dtype=torch.uint8)
    absmax_NG = torch.empty(N, K // checks.BLOCK, dtype=torch.float32)
    status = _library().qsharded_cpu_nf4_quantize(
        _pointer(weight_NK),
        library.DTYPES[weight_NK.dtype],
        absmax_NG.numel(),
        _pointer(midpoints),
        _pointer(codes_NP),
        _pointer(absmax_NG),
        threads or torch.get_num_threads(),
        _isa_number(isa),
    )
    _raise_for(status, isa)
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
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """The weight [N, K] in ``out_dtype``: fp32 level * absmax, rounded once.

    ``absmax_NG``: uint8 codes, decoded as map[code] * scales[(n*G + g) // 256] + offset with every step rounded to
    fp32, or, with scales, offset and map None, fp32. Its rows may be strided.
    ``absmax_scales``: fp32 [ceil(N*G/256)]; ``absmax_offset``: fp32, one element; ``levels``: fp32 [16];
    ``absmax_map``: fp32 [256]. ``threads`` and ``isa`` as in ``quantize``.

    Raises:
        ValueError: this machine lacks ``isa``.
    """
    codes_NP = codes_NP.contiguous()
    absmax_NG = absmax_NG if absmax_NG.stride(1) == 1 else absmax_NG.contiguous()
    N, G = absmax_NG.shape
    checks.assert_encoded(codes_NP, absmax_NG, absmax_scales, absmax_offset, levels, absmax_map)
    out_NK = torch.empty(N, G * checks.BLOCK, dtype=out_dtype)
    status = _library().qsharded_cpu_nf4_dequantize(
        _pointer(codes_NP),
        N,
        G,
        _pointer(absmax_NG),
        absmax_NG.stride(0),
        _pointer(absmax_scales),
        _pointer(absmax_offset),
        _pointer(absmax_map),
        _pointer(levels),
        _pointer(out_NK),
        library.DTYPES[out_dtype],
        threads or torch.get_num_threads(),
        _isa_number(isa),
    )
    _raise_for(status, isa)
    return out_NK


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


def _isa_number(isa: str | None) -> int:
    return _library().qsharded_cpu_isa() if isa is None else ISA_NAMES.index(isa)


def _raise_for(status: int, isa: str | None) -> None:
    if status == library.BAD_ISA:
        raise ValueError(f"this machine does not run {isa}; the best it has is {best_isa()}")
    assert status == 0, status


def _library() -> CDLL:
    compiled = library.load()
    assert compiled is not None, "ask is_available() first"
    return compiled
