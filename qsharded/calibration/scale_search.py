"""A block's scale by search: of either sign, since the codebook is not symmetric, and weighted by the inputs.

Axes: M = blocks, B = weights in a block, C = candidates.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qsharded.quant import formats
from qsharded.quant.formats import QuantFormat

# Parts of the block's largest magnitude: below .82 and above 1.06 few blocks have their best.
_FACTORS = tuple(round(0.82 + 0.02 * step, 2) for step in range(13))
_ELEMENTS_AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 25}  # a CPU's caches, a GPU's launches


@cache
def _candidates(device: torch.device) -> Tensor:
    """fp32 [C, 1]."""
    return torch.tensor([*_FACTORS, *(-factor for factor in _FACTORS)], dtype=torch.float32, device=device)[:, None]


def search_scales(
    blocks_MB: Tensor,
    importance_MB: Tensor,
    quant_format: QuantFormat,
    readable: Callable[[Tensor, slice], Tensor] | None = None,
) -> Tensor:
    """fp32 [M]: the scale with the least sum of ``importance * (weight - decoded)^2`` over each block.

    Args:
        blocks_MB: the weights, fp32.
        importance_MB: of each weight's column: the mean square of its input. Broadcastable.
        readable: from wanted scales [C, m] of the blocks in a slice to those that a decoder will read; by default the
            same.

    Of equal sums the first of positive scales, from the smallest on, counts.
    """
    importance_MB = importance_MB.expand_as(blocks_MB)
    at_once = _ELEMENTS_AT_A_TIME.get(blocks_MB.device.type, 1 << 18)
    step = max(1, at_once // (2 * len(_FACTORS) * blocks_MB.shape[1]))
    scales_M = blocks_MB.new_empty(blocks_MB.shape[0])
    for start in range(0, blocks_MB.shape[0], step):
        part = slice(start, start + step)
        wanted_CM = _candidates(blocks_MB.device) * blocks_MB[part].abs().amax(-1)
        scales_CM = wanted_CM if readable is None else readable(wanted_CM, part)
        error_CM = _weighted_errors(blocks_MB[part], importance_MB[part], scales_CM, quant_format)
        scales_M[part] = scales_CM.gather(0, error_CM.argmin(0, keepdim=True))[0]
    return scales_M


def _weighted_errors(blocks_MB: Tensor, importance_MB: Tensor, scales_CM: Tensor, quant_format: QuantFormat) -> Tensor:
    """fp32 [C, M]."""
    scaled_CMB = (blocks_MB * reciprocal(scales_CM)[..., None]).clamp_(-1, 1)
    decoded_CMB = _nearest_values(scaled_CMB, quant_format).mul_(scales_CM[..., None])
    return torch.einsum("cmb,mb->cm", decoded_CMB.sub_(blocks_MB).square_(), importance_MB)


def _nearest_values(scaled: Tensor, quant_format: QuantFormat) -> Tensor:
    """fp32: the codebook's values nearest to ``scaled``, which is within -1 and 1."""
    if scaled.is_cuda:
        return decode_values(formats.nearest_codes(scaled, quant_format.quant_type), quant_format)
    # on a CPU fifteen comparisons take a fifth of a search
    place = torch.zeros_like(scaled, dtype=torch.uint8)
    for threshold in formats.thresholds(scaled.device, quant_format.quant_type):
        place += scaled > threshold
    ascending = formats.codebook(scaled.device, quant_format.quant_type).sort().values
    return ascending.index_select(0, place.flatten().int()).view(scaled.shape)


def nearest_codes(weights: Tensor, scales: Tensor, quant_format: QuantFormat) -> Tensor:
    """uint8: the codes of fp32 ``weights`` under ``scales``, of either sign and broadcastable."""
    return formats.nearest_codes((weights * reciprocal(scales)).clamp(-1, 1), quant_format.quant_type)


def decode_values(codes: Tensor, quant_format: QuantFormat) -> Tensor:
    """fp32: the codebook's values of ``codes``."""
    return formats.codebook(codes.device, quant_format.quant_type)[codes.int()]


def reciprocal(scales: Tensor) -> Tensor:
    """1/scale, finite where the scale is 0 too, as in a block of zeros."""
    return 1 / scales.abs().clamp(min=formats.SMALLEST_ABSMAX).copysign(scales)
