"""Scales below zero in a packed checkpoint, which are sound: a search of scales takes either sign."""

from collections.abc import Collection

import torch
from torch import Tensor

from qsharded.checkpoint.expected_tensors import packed_bytes
from qsharded.checkpoint.packed_format import (
    ABSMAX,
    BNB_ABSMAX,
    BNB_NESTED,
    BNB_STATE,
    OFFSET,
    SCALES,
    read_bitsandbytes_state,
)
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant import blockwise8


def count_negative_scales(source: SafetensorsFolder, names: Collection[str]) -> tuple[int, int]:
    """(how many blocks have one, how many blocks there are) among the tensors ``names``, all of a folder's.

    Raises:
        ValueError, KeyError: damaged, or not all there.
    """
    negative = blocks = 0
    for name in sorted(packed_bytes(names)):
        scales = _scales(source, name, names)
        negative, blocks = negative + int((scales < 0).sum()), blocks + scales.numel()
    return negative, blocks


def _scales(source: SafetensorsFolder, name: str, names: Collection[str]) -> Tensor:
    """fp32, flat: those of all blocks of a packed weight."""
    if name + ABSMAX in names:
        absmax, nested = source.whole(name + ABSMAX), name + SCALES
        offset = source.whole(name + OFFSET).view(-1, 1) if nested in names else torch.zeros(1, 1)
    else:
        absmax, nested = source.whole(name + BNB_ABSMAX), name + BNB_NESTED
        offset = torch.tensor([[_bitsandbytes_offset(source, name, names) if nested in names else 0.0]])
    if nested not in names:
        return absmax.flatten().view(torch.float32)
    if absmax.numel() % len(offset) or source.whole(nested).numel() % len(offset):
        raise ValueError(f"{nested} is not of as many experts as {name + OFFSET}")
    codes_EV = absmax.view(offset.shape[0], -1)  # of experts each by itself; of another weight one row
    second_EV = source.whole(nested).view(offset.shape[0], -1).repeat_interleave(blockwise8.BLOCK, dim=1)
    if second_EV.shape[1] < codes_EV.shape[1]:
        raise ValueError(f"{nested} has scales of {second_EV.numel():,} blocks, {name} has {absmax.numel():,}")
    return (blockwise8.dequantize(codes_EV, second_EV[:, : codes_EV.shape[1]]) + offset).flatten()


def _bitsandbytes_offset(source: SafetensorsFolder, name: str, names: Collection[str]) -> float:
    state = next(other for other in names if other.startswith(name + BNB_STATE))
    return float(read_bitsandbytes_state(source.whole(state), state)["nested_offset"])
