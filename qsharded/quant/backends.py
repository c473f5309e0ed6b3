"""Which implementation serves a device: the compiled library, Triton, or the reference in ``nf4``.

The kernels are for blocks of 64. They decode with whatever codebook they are given, and quantize to NF4 alone: to FP4,
and in other blocks, the reference serves everywhere.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.quant import blockwise8
from qsharded.quant import formats as nf4
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded_kernels import compiled_absmax, cpu, cpu_nf4, cuda, cuda_linear, cuda_nf4, fused_rows

BACKENDS = ("compiled", "triton", "reference")


@dataclass(frozen=True)
class Kernels:
    """``nf4``: quantize and dequantize. ``absmax``: double quantization, whole or in steps."""

    nf4: ModuleType
    absmax: ModuleType


def quantize(weight: Tensor, quant_format: QuantFormat = NF4_64) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a checked weight, by the fastest implementation for its device."""
    kernels = _kernels(weight.device) if quant_format == NF4_64 else None
    if kernels is None:
        return nf4.encode(weight, quant_format)
    return kernels.nf4.quantize(weight, nf4.thresholds(weight.device))


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    dtype: torch.dtype,
    quant_format: QuantFormat = NF4_64,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The weight [N, K] behind checked codes, by the fastest implementation for their device that has ``dtype``.

    ``out``: [N, K] of ``dtype`` to write to, each row contiguous and 16-byte aligned.
    """
    kernels = _kernels(codes.device) if quant_format.block_size == nf4.BLOCK else None
    if kernels is None or dtype not in nf4.FLOAT_DTYPES:
        weight = dequantize_by_reference(codes, absmax, absmax_scales, absmax_offset, dtype, quant_format)
        return weight if out is None else out.copy_(weight)
    if out is not None and kernels.nf4 is not cuda_nf4 and not out.is_contiguous():
        return out.copy_(dequantize(codes, absmax, absmax_scales, absmax_offset, dtype, quant_format))
    codebook, absmax_map = (
        nf4.codebook(codes.device, quant_format.quant_type),
        blockwise8.dynamic_map(True, codes.device),
    )
    return kernels.nf4.dequantize(codes, absmax, absmax_scales, absmax_offset, codebook, absmax_map, dtype, out=out)


def dequantize_parts(parts: Sequence[cuda_nf4.Part], out: Tensor, tail: int, quant_format: QuantFormat) -> bool:
    """Several weights and their adapters' B into ``out``, as ``cuda_nf4.dequantize_parts``, where that serves them;
    else nothing is done, and False returned."""
    kernels = _kernels(out.device) if quant_format.block_size == nf4.BLOCK else None
    if kernels is None or kernels.nf4 is not cuda_nf4 or out.dtype != torch.bfloat16:
        return False
    if len(parts) > cuda_nf4.MOST_PARTS or len({part[2] is None for part in parts}) > 1:
        return False
    codebook, absmax_map = nf4.codebook(out.device, quant_format.quant_type), blockwise8.dynamic_map(True, out.device)
    cuda_nf4.dequantize_parts(parts, codebook, absmax_map, out, tail)
    return True


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    quant_format: QuantFormat = NF4_64,
) -> Tensor:
    """``x @ W.T + bias`` of checked arguments: fused for few rows of x, else W is decoded first."""
    N, K = codes.shape[0], codes.shape[1] * 2
    M, device = x.shape[:-1].numel(), codes.device
    can_fuse = K > 0 and quant_format.block_size == nf4.BLOCK and _has_fused_linear(device, x.dtype)
    if not can_fuse or not 0 < M <= fused_rows.most_rows(N, K, device):
        # The decoded W is an ordinary tensor, freed on return: the caching allocator hands its memory to the next one
        # on this stream, and keeps it in the graph's pool during a capture. A workspace of our own would be held where
        # nothing is decoded, and could not grow once a captured graph points at it.
        return F.linear(x, dequantize(codes, absmax, absmax_scales, absmax_offset, x.dtype, quant_format), bias)
    tables = nf4.codebook(device, quant_format.quant_type), blockwise8.dynamic_map(True, device)
    y = cuda_linear.linear(x.reshape(-1, K), codes, absmax, absmax_scales, absmax_offset, *tables, bias)
    return y.view(*x.shape[:-1], N)


def dequantize_by_reference(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    dtype: torch.dtype,
    quant_format: QuantFormat = NF4_64,
) -> Tensor:
    """The same in plain PyTorch, on any device."""
    if absmax_scales is not None and absmax_offset is not None:
        absmax = nf4.decode_absmax(absmax, absmax_scales, absmax_offset)
    return nf4.decode(codes, absmax, dtype, quant_format)


# Double quantization, whole and in the steps that ranks take together: as the functions of these names in ``nf4``.


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, G], scales fp32 [ceil(N*G/256)] and offset fp32 [] of a whole weight's absmax, fp32 [N, G]."""
    kernels = _kernels(absmax.device)
    if kernels is None:
        return nf4.double_quantize(absmax)
    return kernels.absmax.double_quantize(absmax, blockwise8.thresholds(True, absmax.device))


def absmax_row_sums(absmax: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right."""
    return _absmax_steps(absmax.device).absmax_row_sums(absmax)


def absmax_offset(row_sums: Tensor, G: int) -> Tensor:
    """fp32 [] on their device: the mean of a whole weight's absmax, from its row sums added from first to last."""
    return _absmax_steps(row_sums.device).absmax_offset(row_sums, G)


def absmax_scales(absmax: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of the 256-blocks as far as these rows reach; 0 where they do not."""
    return _absmax_steps(absmax.device).absmax_scales(absmax, offset, first_row=first_row, rows=rows)


def encode_absmax(absmax: Tensor, scales: Tensor, offset: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's scales and offset."""
    kernels = _kernels(absmax.device)
    if kernels is None:
        return nf4.encode_absmax(absmax, scales, offset, first_row=first_row)
    thresholds = blockwise8.thresholds(True, absmax.device)
    return kernels.absmax.encode_absmax(absmax, scales, offset, thresholds, first_row=first_row)


def _absmax_steps(device: torch.device) -> ModuleType:
    """Who has those steps that take no table."""
    kernels = _kernels(device)
    return nf4 if kernels is None else kernels.absmax


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
def _kernels(device: torch.device) -> Kernels | None:
    """The kernels that serve a device; None where plain PyTorch has to do.

    Raises:
        ValueError: QSHARDED_BACKEND asks for some that do not.
    """
    wanted = wanted_backend()
    if wanted == "reference":
        return None
    served = implementations(device)
    if wanted is not None and wanted not in served:
        there = ", ".join([*served, "reference"])
        raise ValueError(f"QSHARDED_BACKEND={wanted} does not serve {device} here; what does: {there}")
    return served[wanted] if wanted else next(iter(served.values()), None)


def implementations(device: torch.device) -> dict[str, Kernels]:
    """The kernels that run on a device by their name in ``BACKENDS``, the fastest first."""
    served = {}
    if device.type == "cpu" and cpu.is_available():
        served["compiled"] = Kernels(cpu_nf4, compiled_absmax)
    if device.type == "cuda" and cuda.is_available(device):
        served["compiled"] = Kernels(cuda_nf4, compiled_absmax)
    if device.type == "cuda":
        from qsharded_kernels import triton_absmax, triton_nf4  # here: Triton loads slowly

        served["triton"] = Kernels(triton_nf4, triton_absmax)
    return served


@cache
def _has_fused_linear(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel multiplies there without decoding first."""
    if device.type != "cuda" or dtype not in cuda_linear.DTYPES or wanted_backend() not in (None, "compiled"):
        return False
    return cuda.is_available(device)


def serving(device: torch.device) -> str:
    """Which of ``BACKENDS`` serves a device, for people to read; others that could follow in brackets.

    Raises:
        ValueError: as any operation there would: QSHARDED_BACKEND asks for one that does not serve it.
    """
    chosen, served = _kernels(device), implementations(device)
    name = next((name for name, kernels in served.items() if kernels == chosen), "reference")
    others = [other for other in (*served, "reference") if other != name]
    asked = ", as QSHARDED_BACKEND asks" if wanted_backend() else ""
    return f"{name}{asked} (also there: {', '.join(others)})" if others else name + asked
