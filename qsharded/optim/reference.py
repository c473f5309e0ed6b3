"""One AdamW step on moments kept in 8 bits, in plain PyTorch. Every kernel is held to its bytes.

    m = beta1 m + (1 - beta1) g        p = p (1 - lr wd)
    v = beta2 v + (1 - beta2) g^2      p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

A moment is a code a value and a scale for 256: m on the signed dynamic map, v on the unsigned one. All arithmetic is
fp32, rounded after each operation; p is rounded once to its own type.
Sources: Loshchilov and Hutter, arXiv:1711.05101; Dettmers et al., arXiv:2110.02861. Codes, scales and the sign rule are
bitsandbytes' AdamW8bit's.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.quant import blockwise8

LARGEST = torch.finfo(torch.float32).max


class Coefficient(IntEnum):
    """The columns of a step's coefficients; the kernels read them in this order."""

    GRADIENT_SCALE = 0
    BETA1 = 1
    ONE_MINUS_BETA1 = 2
    BETA2 = 3
    ONE_MINUS_BETA2 = 4
    EPS = 5
    DECAY = 6
    """1 - lr weight_decay"""
    STEP_SIZE = 7
    """lr / (1 - beta1^t)"""
    ROOT_SCALE = 8
    """1 / sqrt(1 - beta2^t)"""


@dataclass(frozen=True)
class Moments:
    """Both moments of consecutive values: uint8 codes, and a scale (fp32) a block of 256. ``lead`` values are missing
    from the first block's start. Where the scales are None the moments are fp32 themselves."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None
    lead: int = 0


def adamw_(parameter: Tensor, gradient: Tensor, moments: Moments, coefficients: Tensor) -> None:
    """Update ``parameter`` and ``moments`` in place.

    Args:
        parameter, gradient: [n], fp32 or bf16.
        moments: of these n values.
        coefficients: fp32 [9], as :class:`Coefficient` numbers them.
    """
    factor, beta1, rest1, beta2, rest2, eps, decay, step_size, root_scale = coefficients.unbind()
    g = gradient.float() * factor
    m = dequantize_state(moments.state1, moments.absmax1, moments.lead, signed=True) * beta1 + g * rest1
    # a v beyond fp32 would be read as NaN for good
    v = (dequantize_state(moments.state2, moments.absmax2, moments.lead, signed=False) * beta2 + g * rest2 * g).clamp(
        max=LARGEST
    )
    deviation = v.double().sqrt().float()  # rightly rounded, which PyTorch's fp32 root on a CPU is not
    parameter.copy_(parameter.float() * decay - m / (deviation * root_scale + eps) * step_size)
    quantize_state_(m, moments.state1, moments.absmax1, moments.lead, signed=True)
    quantize_state_(v, moments.state2, moments.absmax2, moments.lead, signed=False)


def dequantize_state(state: Tensor, absmax: Tensor | None, lead: int, *, signed: bool) -> Tensor:
    """The fp32 moment [n] behind ``state`` [n]."""
    if absmax is None:
        return state
    return blockwise8.dequantize(state, _spread(absmax, lead, state.numel()), signed)


def quantize_state_(values: Tensor, state: Tensor, absmax: Tensor | None, lead: int, *, signed: bool) -> None:
    """Write the fp32 moment ``values`` [n] to ``state`` [n] and ``absmax``."""
    if absmax is None:
        state.copy_(values)
        return
    absmax.copy_(block_maxima(values, lead))
    codes = blockwise8.nearest_codes(values, _spread(absmax, lead, values.numel()), signed)
    if signed:
        # bitsandbytes' rule: what is below zero stays below
        codes = torch.where((values < 0) & (codes == blockwise8.ZERO_CODE), blockwise8.ZERO_CODE - 1, codes)
    state.copy_(codes)


def block_maxima(values: Tensor, lead: int) -> Tensor:
    """The largest magnitude in each block of 256, of which ``lead`` values are missing from the first."""
    tail = -(lead + values.numel()) % blockwise8.BLOCK
    return F.pad(values.abs(), (lead, tail)).view(-1, blockwise8.BLOCK).amax(1)


def _spread(absmax: Tensor, lead: int, count: int) -> Tensor:
    return absmax.repeat_interleave(blockwise8.BLOCK)[lead : lead + count]
