"""The operations of ``qsharded.quant.ops`` called with the schemas' flat arguments."""

import torch
from torch import Tensor

from qsharded.quant import ops
from qsharded.quant.formats import QuantFormat
from qsharded.quant.packed_weight import PackedWeight


def nf4_quantize(weight: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    return ops.nf4_quantize(weight, QuantFormat(quant_type, block_size))


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quant_type: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    quant_format = QuantFormat(quant_type, block_size)
    return ops.nf4_dequantize(PackedWeight(codes, absmax, absmax_scales, absmax_offset, quant_format), dtype)


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    bias: Tensor | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    quant_format = QuantFormat(quant_type, block_size)
    return ops.nf4_linear(x, PackedWeight(codes, absmax, absmax_scales, absmax_offset, quant_format), bias)
