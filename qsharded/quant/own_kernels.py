"""Our kernels as :class:`Kernels`: the compiled library's and Triton's. They take flat tensors, and their tables.

They are for blocks of 64. They dequantize with whatever codebook they are given, and quantize to NF4 alone.
"""

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qsharded.quant import blockwise8, formats
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.kernels import AdaptedWeight, Kernels
from qsharded.quant.packed_weight import PackedWeight
from qsharded.quant.pieces import Pieces
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


class CudaKernels(CodebookKernels):
    """On GPUs experts that have few tokens each are multiplied by Triton, whoever serves the rest."""

    def multiplies_experts(
        self, shape: tuple[int, int], quant_format: QuantFormat, rows: float, dtype: torch.dtype
    ) -> bool:
        from qsharded_kernels import triton_grouped

        few = rows <= _MOST_ROWS_OF_AN_EXPERT and triton_grouped.serves(*shape, dtype)
        return few and dequantizes(quant_format)

    def experts_linear(
        self,
        x_RK: Tensor,
        experts: Sequence[Tensor | None],
        quant_format: QuantFormat,
        pieces: Pieces,
    ) -> Tensor:
        return triton_grouped_linear(x_RK, experts, quant_format, pieces)


class TritonCuda(CudaKernels):
    """Those of Triton. ``fuses``: whether they multiply few rows of x too."""

    def __init__(self, nf4: ModuleType, absmax: ModuleType, fuses: bool) -> None:
        super().__init__(nf4, absmax)
        self._fuses = fuses

    def multiplies(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        from qsharded_kernels import triton_linear as fused
        from qsharded_kernels import triton_tiles

        if not self._fuses or 0 in packed.shape or not dequantizes(packed.quant_format) or dtype not in fused.DTYPES:
            return False
        return 0 < M <= min(fused.MOST_ROWS, triton_tiles.most_rows(*packed.shape, packed.device))

    def linear(self, x_MK: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return triton_linear(x_MK, packed, bias)

    def multiplies_grad(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        return self.multiplies(packed, M, dtype)

    def input_grad(self, grad_MN: Tensor, packed: PackedWeight) -> Tensor:
        return triton_input_grad(grad_MN, packed)


class CompiledCuda(CudaKernels):
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
        factor = rounding_factor(packed.quant_format.quant_type, x_MK.dtype)
        return cuda_linear.linear(x_MK, *packed.tensors, *tables(packed), bias, factor=factor)


def dequantizes(quant_format: QuantFormat) -> bool:
    """Whether the kernels are written for blocks of this size whose scales are stored so."""
    return quant_format.block_size == formats.BLOCK and quant_format.scale_encoding is ABSMAX


def tables(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """The weight's codebook, and the map of its 8-bit absmax."""
    device = packed.device
    return formats.codebook(device, packed.quant_format.quant_type), blockwise8.dynamic_map(True, device)


def triton_linear(
    x_MK: Tensor, packed: PackedWeight, bias: Tensor | None, *, tile: Any = None, splits: int | None = None
) -> Tensor:
    """``x W^T + bias`` for few rows, by Triton with the codebook rounded to x's dtype. ``tile``: a ``LinearTile`` in
    place of the table's."""
    from qsharded_kernels import triton_linear as fused
    from qsharded_kernels import triton_tiles

    lookups, factor = _lookups(packed.device, packed.quant_format.quant_type, x_MK.dtype)
    tile = tile or triton_tiles.linear_tile(*packed.shape, len(x_MK), packed.device)
    absmax_map = blockwise8.dynamic_map(True, packed.device)
    return fused.linear(x_MK, *packed.tensors, lookups, factor, absmax_map, bias, tile=tile, splits=splits)


def triton_grouped_linear(
    x_RK: Tensor,
    experts: Sequence[Any],
    quant_format: QuantFormat,
    pieces: Pieces,
    *,
    tile: Any = None,
) -> Tensor:
    """``x W^T`` [R, N], each piece of rows with its expert's, by Triton in one launch.

    Args:
        experts: codes, absmax and second level, as ``PackedExpertWeights`` has them.
        pieces: of the rows of x.
        tile: a ``LinearTile`` in place of the default.
    """
    from qsharded_kernels import triton_grouped, triton_tiles

    codes_ENP, absmax_ENG, scales_ES, offset_E = experts
    device, (table_Q3, most) = x_RK.device, pieces
    tile = tile or triton_tiles.DEFAULT  # the table's tiles were measured for one weight, whose columns are cut too
    lookups, factor = _lookups(device, quant_format.quant_type, x_RK.dtype)
    absmax_map = blockwise8.dynamic_map(True, device)
    packed = codes_ENP, absmax_ENG, scales_ES, offset_E
    return triton_grouped.grouped_linear(x_RK, *packed, lookups, factor, absmax_map, table_Q3, most=most, tile=tile)


def triton_input_grad(grad_MN: Tensor, packed: PackedWeight, *, tile: Any = None, splits: int | None = None) -> Tensor:
    """``dy W`` for few rows, by Triton. ``tile``: an ``InputGradTile`` in place of the table's."""
    from qsharded_kernels import triton_input_grad as fused
    from qsharded_kernels import triton_tiles

    tile = tile or triton_tiles.input_grad_tile(*packed.shape, len(grad_MN), packed.device)
    return fused.input_grad(grad_MN, *packed.tensors, *tables(packed), tile=tile, splits=splits)


# Beyond so many the tensor cores are busy, and decoding once for all of a group's rows costs less.
_MOST_ROWS_OF_AN_EXPERT = 32

# Multiplied by these before they are rounded, the values err least, and with no bias that sums would gather: found by
# search over four decimals for NF4, as its normal weights are spread; FP4's are twelfths, and so exact.
_FACTORS = {("nf4", torch.bfloat16): 1.1888, ("nf4", torch.float16): 1.3243}
_FACTORS |= {("fp4", dtype): 12.0 for dtype in (torch.bfloat16, torch.float16)}


def rounding_factor(quant_type: str, dtype: torch.dtype) -> float:
    """What the codebook is multiplied by before it is rounded to ``dtype``."""
    return _FACTORS.get((quant_type, dtype), 1.0)


@cache
def _lookups(device: torch.device, quant_type: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """What the product looks up in place of the codebook, and the factor that is in it."""
    from qsharded_kernels import triton_decode

    factor = rounding_factor(quant_type, dtype)
    return triton_decode.lookups((formats.codebook(device, quant_type).double() * factor).to(dtype)), factor


def compiled_for_cpu(device: torch.device) -> Kernels | None:
    """Where the library was built."""
    return CodebookKernels(cpu_nf4, compiled_absmax) if cpu.is_available() else None


def compiled_for_cuda(device: torch.device) -> Kernels | None:
    """Where the library was built for GPUs like this one."""
    return CompiledCuda() if cuda.is_available(device) else None


def triton_for_cuda(device: torch.device) -> Kernels | None:
    """On any GPU. They multiply where the compiled library does not, or where QSHARDED_BACKEND asks for them."""
    from qsharded_kernels import triton_absmax, triton_nf4  # here: Triton loads slowly

    asked = os.environ.get("QSHARDED_BACKEND") == "triton"
    return TritonCuda(triton_nf4, triton_absmax, fuses=asked or not cuda.is_available(device))
