"""Blockwise 8-bit numbers on the dynamic map, the code behind NF4's second-level scales and 8-bit optimizer state.

A value is stored as the index of the nearest map entry to ``value / max(abs(block))``. The map spends its bits on
orders of magnitude near zero and on fractions near one.
Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
ZERO_CODE = 127  # where the signed map holds 0
SMALLEST_SCALE = 1e-38  # an all-zero block is scaled by the reciprocal of this, so its codes are ZERO_CODE

_DECADES = 7


@cache
def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The 256 fp32 map entries in ascending order. The tensor is shared: do not write to it."""
    fractions = [_decade(decade, signed) for decade in range(_DECADES)]
    magnitudes = torch.cat(fractions)
    values = torch.cat([-magnitudes, magnitudes]) if signed else magnitudes
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    entries = torch.cat([values, ends]).sort().values
    assert entries.numel() == 256
    return entries.to(device)


def _decade(decade: int, signed: bool) -> Tensor:
    """Midpoints of equal steps over [0.1, 1], twice as many from one decade to the next, scaled to their decade."""
    steps = 2**decade if signed else 2 ** (decade + 1)
    edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")  # a GPU may round otherwise
    return 10 ** (decade - _DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)


@cache
def thresholds(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The 255 fp32 midpoints between neighbouring map entries. The tensor is shared: do not write to it."""
    entries = dynamic_map(signed)
    return ((entries[:-1] + entries[1:]) / 2).to(device)


def nearest_codes(values: Tensor, scales: Tensor, signed: bool = True) -> Tensor:
    """Codes of ``values`` (fp32, any shape) under ``scales`` (broadcastable: each value's block maximum) as uint8."""
    scaled = (values * (1 / scales.clamp(min=SMALLEST_SCALE))).clamp(-1, 1)
    return torch.bucketize(scaled, thresholds(signed, values.device), out_int32=True).to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, signed: bool = True) -> Tensor:
    """The fp32 values of uint8 ``codes`` under ``scales`` (broadcastable: each code's block maximum)."""
    return dynamic_map(signed, codes.device)[codes.int()] * scales
