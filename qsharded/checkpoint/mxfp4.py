"""MXFP4 as gpt-oss stores its experts, to bf16.

Each value is a 4-bit float (sign, two bits of exponent, one of mantissa), the first of a byte in its low nibble; 32 of
them share a scale, a power of two stored as its exponent plus 127. Every value is a bf16 exactly.
Source: OCP Microscaling Formats (MX) v1.0.
"""

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
"""What follows the name of a tensor that is stored so."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127


def is_mxfp4(name: str) -> bool:
    """Whether a tensor of this name holds codes or scales of experts."""
    return ".experts." in name and name.endswith((BLOCKS, SCALES))


def decode_mxfp4(blocks_NGB: Tensor, scales_NG: Tensor) -> Tensor:
    """bf16 [N, 32 G] of uint8 blocks [N, G, 16] and scales [N, G]."""
    values = torch.tensor(_VALUES, dtype=torch.bfloat16, device=blocks_NGB.device)
    codes = torch.stack((blocks_NGB & 15, blocks_NGB >> 4), dim=-1).flatten(2)
    return torch.ldexp(values[codes.int()], scales_NG[..., None].int() - _BIAS).flatten(1)
