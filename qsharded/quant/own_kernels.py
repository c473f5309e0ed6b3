"""Our kernels as :class:`Kernels`: the compiled library's and Triton's. They take flat tensors, and their tables.

They are for blocks of 64. They dequantize with whatever codebook they are given, and quantize to NF4 alone.
"""

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from qsharded.quant import blockwise8, formats
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.kernels import AdaptedWeight, Kernels
from qsharded.quant.packed_weight import PackedWeight
from qsharded.quant.scale_encoding import ABSMAX
from qsharded_kernels import compiled_absmax, cpu, cpu_nf4, cuda, cuda_linear, cuda_nf4, fused_rows


class CodebookKernels(Kernels):
    """``nf4``: a module that quantizes and dequantizes. ``absmax``: one for double quantization."""

    def __init__(self, nf4: ModuleType, absmax: ModuleType) -> None:
        self._nf4, self.absmax = nf4, absmax

    def quantizes(self, quant_format: QuantFormat) -> bool:
        return quant_format == NF4_64

    def quantize(self, weight: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
        return self._nf4.quantize(weight, formats.thresholds(weight.device))

    def dequantizes(self, quant_format: QuantFormat, dtype: torch.dtype) -> bool:
        return dequantizes(quant_format) and dtype in formats.FLOAT_DTYPES

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        if out is not None and not self._writes_to(out):
            return out.copy_(self.dequantize(packed, dtype, None))
        return self._nf4.dequantize(*packed.tensors, *tables(packed), dtype, out=out)

    def _writes_to(self, out: Tensor) -> bool:
        return out.is_contiguous()


class TritonCuda(CodebookKernels):
    """Those of Triton. ``fuses``: whether they multiply few rows of x too, which no GPU has been measured with."""

    def __init__(self, nf4: ModuleType, absmax: ModuleType, fuses: bool) -> None:
        super().__init__(nf4, absmax)
        self._fuses = fuses

    def multiplies(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        from qsharded_kernels import triton_linear as fused

        if not self._fuses or 0 in packed.shape or not dequantizes(packed.quant_format):
            return False
        return 0 < M <= fused.MOST_ROWS and dtype in fused.DTYPES

    def linear(self, x_MK: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return triton_linear(x_MK, packed, bias)


class CompiledCuda(CodebookKernels):
    """Those of the compiled library for GPUs, which also multiply few tokens without dequantizing first."""

    def __init__(self) -> None:
        super().__init__(cuda_nf4, compiled_absmax)

    def _writes_to(self, out: Tensor) -> bool:
        return True

    def dequantize_adapted(self, weights: list[AdaptedWeight], out: Tensor, tail: int) -> bool:
        first = weights[0][0]
        nested = {packed.absmax_scales is not None for packed, *_ in weights}
        if len(weights) > cuda_nf4.MOST_PARTS or len(nested) > 1 or out.dtype != torch.bfloat16:
            return False
        parts = [(*packed.tensors, B, scaling, column) for packed, B, scaling, column in weights]
        cuda_nf4.dequantize_parts(parts, *tables(first), out, tail)
        return True

    def multiplies(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        N, K = packed.shape
        if K == 0 or not dequantizes(packed.quant_format) or dtype not in cuda_linear.DTYPES:
            return False
        return 0 < M <= fused_rows.most_rows(N, K, packed.device)

    def linear(self, x_MK: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return cuda_linear.linear(x_MK, *packed.tensors, *tables(packed), bias)


def dequantizes(quant_format: QuantFormat) -> bool:
    """Whether the kernels are written for blocks of this size whose scales are stored so."""
    return quant_format.block_size == formats.BLOCK and quant_format.scale_encoding is ABSMAX


def tables(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """The weight's codebook, and the map of its 8-bit absmax."""
    device = packed.device
    return formats.codebook(device, packed.quant_format.quant_type), blockwise8.dynamic_map(True, device)


def triton_linear(x_MK: Tensor, packed: PackedWeight, bias: Tensor | None, *, splits: int | None = None) -> Tensor:
    """``x W^T + bias`` for at most 16 rows, by Triton with the codebook rounded to x's dtype."""
    from qsharded_kernels import triton_linear as fused

    rounded, factor = _rounded_codebook(packed.device, packed.quant_format.quant_type, x_MK.dtype)
    return fused.linear(x_MK, *packed.tensors, rounded, factor, tables(packed)[1], bias, splits=splits)


# Multiplied by these before they are rounded, the values err least, and with no bias that sums would gather: found by
# search over four decimals for NF4, as its normal weights are spread; FP4's are twelfths, and so exact.
_FACTORS = {("nf4", torch.bfloat16): 1.1888, ("nf4", torch.float16): 1.3243}
_FACTORS |= {("fp4", dtype): 12.0 for dtype in (torch.bfloat16, torch.float16)}


@cache
def _rounded_codebook(device: torch.device, quant_type: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    factor = _FACTORS.get((quant_type, dtype), 1.0)
    return (formats.codebook(device, quant_type).double() * factor).to(dtype), factor


def compiled_for_cpu(device: torch.device) -> Kernels | None:
    """Where the library was built."""
    return CodebookKernels(cpu_nf4, compiled_absmax) if cpu.is_available() else None


def compiled_for_cuda(device: torch.device) -> Kernels | None:
    """Where the library was built for GPUs like this one."""
    return CompiledCuda() if cuda.is_available(device) else None


def triton_for_cuda(device: torch.device) -> Kernels | None:
    """On any GPU. The fused product only where QSHARDED_BACKEND asks for Triton, until a table of measurements says
    when it pays."""
    from qsharded_kernels import triton_absmax, triton_nf4  # here: Triton loads slowly

    return TritonCuda(triton_nf4, triton_absmax, fuses=os.environ.get("QSHARDED_BACKEND") == "triton")
