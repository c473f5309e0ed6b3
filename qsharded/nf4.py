"""The public quantizer: a matrix to NF4 (or FP4) and back, by the kernels that serve its device.

    weight = qsharded.nf4.quantize(matrix)
    weight.codes, weight.absmax, weight.dequantize()

``quantize_by_reference`` gives the same bytes in plain PyTorch, many times slower: what kernels are held to.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsharded.quant import ops
from qsharded.quant.formats import BLOCK, QuantFormat, check_weight
from qsharded.quant.formats import quantize as quantize_by_reference
from qsharded.quant.pack_weight import pack_weight
from qsharded.quant.packed_weight import PackedWeight

__all__ = ["NF4Weight", "quantize", "quantize_by_reference"]


@dataclass(frozen=True)
class NF4Weight:
    """A quantized weight [N, K], G = K/block_size blocks in a row.

    Attributes:
        packed: its stored tensors as one value, which ``qsharded.quant.ops`` and layers take.
    """

    packed: PackedWeight

    @property
    def codes(self) -> Tensor:
        """uint8 [N, K/2], two to a byte, the first in the high nibble."""
        return self.packed.codes

    @cached_property
    def absmax(self) -> Tensor:
        """fp32 [N, G], as dequantizing uses it."""
        return self.packed.decoded_absmax()

    @property
    def absmax_codes(self) -> Tensor | None:
        """uint8 [N, G]; like the next two None without double quantization."""
        return None if self.packed.absmax_scales is None else self.packed.absmax

    @property
    def absmax_scales(self) -> Tensor | None:
        """fp32 [ceil(N*G/256)]."""
        return self.packed.absmax_scales

    @property
    def absmax_offset(self) -> Tensor | None:
        """fp32 []."""
        return self.packed.absmax_offset

    @property
    def quant_format(self) -> QuantFormat:
        """What it was quantized to."""
        return self.packed.quant_format

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight [N, K]: value times absmax in fp32, rounded to ``dtype``.

        Raises:
            ValueError: ``dtype`` is none of bfloat16, float16, float32 and float64.
        """
        return ops.nf4_dequantize(self.packed, dtype)


def quantize(
    weight: Tensor, *, quant_type: str = "nf4", block_size: int = BLOCK, double_quant: bool = True
) -> NF4Weight:
    """Quantize ``weight`` [N, K] (bfloat16, float16 or float32) on its own device, to the format of those two names.

    Source: Dettmers et al., "QLoRA", arXiv:2305.14314.

    Raises:
        ValueError: not two-dimensional, empty, K no multiple of ``block_size``, a format or dtype that there is not,
            or NaN or infinity among the weights.
    """
    quant_format = QuantFormat(quant_type, block_size)
    check_weight(weight, quant_format)
    return NF4Weight(pack_weight(weight, quant_format, double_quant=double_quant))
