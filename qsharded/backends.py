"""Which implementation serves a device: the compiled library, Triton, or the reference in ``nf4``."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from qsharded import blockwise8, nf4


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a checked weight, by the fastest implementation for its device."""
    kernels = _kernels(weight.device)
    if kernels is None:
        return nf4.encode(weight)
    return kernels.quantize(weight, nf4.thresholds(weight.device))


def dequantize(
    codes: Tensor, absmax: Tensor, absmax_scales: Tensor | None, absmax_offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] behind checked codes, by the fastest implementation for their device."""
    kernels = _kernels(codes.device)
    if kernels is None:
        return dequantize_by_reference(codes, absmax, absmax_scales, absmax_offset, dtype)
    levels, absmax_map = nf4.levels(codes.device), blockwise8.dynamic_map(True, codes.device)
    return kernels.dequantize(codes, absmax, absmax_scales, absmax_offset, levels, absmax_map, dtype)


def dequantize_by_reference(
    codes: Tensor, absmax: Tensor, absmax_scales: Tensor | None, absmax_offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same in plain PyTorch, on any device."""
    if absmax_scales is not None and absmax_offset is not None:
        absmax = nf4.decode_absmax(absmax, absmax_scales, absmax_offset)
    return nf4.decode(codes, absmax, dtype)


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels that serve a device; None where plain PyTorch has to do. Imported here: Triton loads slowly."""
    if device.type == "cpu":
        from qsharded_kernels import cpu_nf4

        return cpu_nf4 if cpu_nf4.is_available() else None
    if device.type == "cuda":
        from qsharded_kernels import cuda, cuda_nf4, triton_nf4

        return cuda_nf4 if cuda.is_available(device) else triton_nf4
    return None
