"""Which implementation serves a device: the compiled library, Triton, or the reference in ``nf4``."""

import os
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded import blockwise8, nf4

BACKENDS = ("compiled", "triton", "reference")


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


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W.T + bias`` of checked arguments: fused for few rows of x, else W is decoded first."""
    N, K = codes.shape[0], codes.shape[1] * 2
    M, fused = x.numel() // K, _fused_linear(codes.device)
    if fused is None or M == 0 or x.dtype not in fused.DTYPES or not fused.is_faster(M, N, K, codes.device):
        return F.linear(x, dequantize(codes, absmax, absmax_scales, absmax_offset, x.dtype), bias)
    tables = nf4.levels(codes.device), blockwise8.dynamic_map(True, codes.device)
    y = fused.linear(x.reshape(-1, K), codes, absmax, absmax_scales, absmax_offset, *tables, bias)
    return y.view(*x.shape[:-1], N)


def dequantize_by_reference(
    codes: Tensor, absmax: Tensor, absmax_scales: Tensor | None, absmax_offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same in plain PyTorch, on any device."""
    if absmax_scales is not None and absmax_offset is not None:
        absmax = nf4.decode_absmax(absmax, absmax_scales, absmax_offset)
    return nf4.decode(codes, absmax, dtype)


@cache
def wanted_backend() -> str | None:
    """What QSHARDED_BACKEND asks for, read once: one of ``BACKENDS``, or None for the fastest that is there.

    Raises:
        ValueError: it names none of them.
    """
    name = os.environ.get("QSHARDED_BACKEND") or None
    if name not in (None, *BACKENDS):
        raise ValueError(f"QSHARDED_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels that serve a device; None where plain PyTorch has to do.

    Raises:
        ValueError: QSHARDED_BACKEND asks for some that do not.
    """
    wanted = wanted_backend()
    if wanted == "reference":
        return None
    served = _implementations(device)
    if wanted is not None and wanted not in served:
        there = ", ".join([*served, "reference"])
        raise ValueError(f"QSHARDED_BACKEND={wanted} does not serve {device} here; what does: {there}")
    return served[wanted] if wanted else next(iter(served.values()), None)


def _implementations(device: torch.device) -> dict[str, ModuleType]:
    """What runs on a device, the fastest first. Imported here: Triton loads slowly."""
    if device.type == "cpu":
        from qsharded_kernels import cpu_nf4

        return {"compiled": cpu_nf4} if cpu_nf4.is_available() else {}
    if device.type == "cuda":
        from qsharded_kernels import cuda, cuda_nf4, triton_nf4

        compiled = {"compiled": cuda_nf4} if cuda.is_available(device) else {}
        return compiled | {"triton": triton_nf4}
    return {}


@cache
def _fused_linear(device: torch.device) -> ModuleType | None:
    """The kernels that multiply without decoding first, where a device has them."""
    if device.type != "cuda" or wanted_backend() not in (None, "compiled"):
        return None
    from qsharded_kernels import cuda, cuda_linear

    return cuda_linear if cuda.is_available(device) else None


def serving(device: torch.device) -> str:
    """Which of ``BACKENDS`` serves a device, for people to read; others that could follow in brackets.

    Raises:
        ValueError: as any operation there would: QSHARDED_BACKEND asks for one that does not serve it.
    """
    chosen, served = _kernels(device), _implementations(device)
    name = next((name for name, module in served.items() if module is chosen), "reference")
    others = [other for other in (*served, "reference") if other != name]
    asked = ", as QSHARDED_BACKEND asks" if wanted_backend() else ""
    return f"{name}{asked} (also there: {', '.join(others)})" if others else name + asked
