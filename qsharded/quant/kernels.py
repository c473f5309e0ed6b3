"""What a set of kernels offers to :mod:`qsharded.quant.backends`, which are registered there by device and name."""

from collections.abc import Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from qsharded.quant.formats import QuantFormat
from qsharded.quant.packed_weight import PackedWeight

# a packed weight, its adapter's B [n, r] or None, the adapter's scaling, and B's first column behind the weight
AdaptedWeight: TypeAlias = tuple[PackedWeight, Tensor | None, float, int]


class Kernels:
    """Kernels for one device. What they are not for (the questions say no) goes to the next, or to plain PyTorch.

    Attributes:
        absmax: double quantization, whole and in steps, as the functions of ``qsharded.quant.formats``, with the
            8-bit map's thresholds after the tensors of ``double_quantize`` and ``encode_absmax``; or None.
    """

    absmax: ModuleType | None = None

    def quantizes(self, quant_format: QuantFormat) -> bool:
        """Whether :meth:`quantize` is for this format."""
        return False

    def quantize(self, weight: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
        """Codes and absmax of a checked weight, byte for byte those of ``formats.quantize_blocks``."""
        raise NotImplementedError

    def dequantizes(self, quant_format: QuantFormat, dtype: torch.dtype) -> bool:
        """Whether :meth:`dequantize` is for this format and ``dtype``."""
        return False

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """The weight [N, K] behind checked codes, in ``out`` where it is given, whose rows may lie apart."""
        raise NotImplementedError

    def dequantize_adapted(self, weights: list[AdaptedWeight], out: Tensor, tail: int) -> bool:
        """Several weights and their adapters' B into ``out`` at once; False where nothing was done."""
        return False

    def multiplies(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        """Whether :meth:`linear` is for ``M`` tokens of ``dtype``, and pays."""
        return False

    def linear(self, x_MK: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias`` [M, N] without the dequantized weight in memory."""
        raise NotImplementedError

    def multiplies_experts(
        self, shape: tuple[int, int], quant_format: QuantFormat, rows: float, dtype: torch.dtype
    ) -> bool:
        """Whether :meth:`experts_linear` is for experts' weights of this shape [N, K], each with so many rows of
        ``dtype`` on average, and pays."""
        return False

    def experts_linear(
        self,
        x_RK: Tensor,
        experts: Sequence[Tensor | None],
        quant_format: QuantFormat,
        groups: Sequence[tuple[int, int]],
    ) -> Tensor:
        """``x W^T`` [R, N], each group of rows with its expert's, none dequantized in memory.

        Args:
            experts: uint8 codes [E, N, P], absmax [E, N, G], and their second level [E, S] and [E], or None.
            groups: experts and how many rows each has, in the order of the rows.
        """
        raise NotImplementedError

    def multiplies_grad(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        """Whether :meth:`input_grad` is for ``M`` tokens of ``dtype``, and pays."""
        return False

    def input_grad(self, grad_MN: Tensor, packed: PackedWeight) -> Tensor:
        """``grad @ W`` [M, K] without the dequantized weight in memory."""
        raise NotImplementedError
