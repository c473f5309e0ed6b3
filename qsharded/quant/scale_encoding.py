"""How the scale of a quantization block is stored, beside its codes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleEncoding:
    """From the largest magnitude of a block (absmax) to what is stored of it, and to the scale of its values.

    Attributes:
        dtype: of what is stored: float32 or uint8.
        encode: absmax fp32 to what is stored, element by element.
        decode: what is stored to the fp32 scale: values are divided by it when they are quantized, and the codebook's
            are multiplied by it. What ``absmax / scale`` has beyond the codebook's ends is cut off.
        nests: whether double quantization may follow.
    """

    dtype: torch.dtype
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    nests: bool = False


def _same(absmax: Tensor) -> Tensor:
    return absmax


ABSMAX = ScaleEncoding(torch.float32, _same, _same, nests=True)
