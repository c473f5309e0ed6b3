"""The format's sizes, and what every backend assumes of its arguments. Users' mistakes are caught further up."""

import torch
from torch import Tensor

BLOCK = 64  # weights that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a second-level scale
LEVELS = 16
MIDPOINTS = LEVELS - 1


def assert_weight(weight_NK: Tensor, midpoints: Tensor) -> None:
    """What ``quantize`` assumes."""
    assert weight_NK.is_contiguous()
    assert weight_NK.shape[1] % BLOCK == 0, weight_NK.shape
    _assert_table(midpoints, MIDPOINTS)


def assert_encoded(
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    absmax_map: Tensor | None,
) -> None:
    """What ``dequantize`` assumes."""
    N, G = absmax_NG.shape
    assert codes_NP.shape == (N, G * BLOCK // 2), (codes_NP.shape, absmax_NG.shape)
    assert codes_NP.is_contiguous()
    assert codes_NP.dtype == torch.uint8
    assert absmax_NG.stride(1) == 1
    _assert_table(levels, LEVELS)
    if absmax_scales is None:
        assert absmax_NG.dtype == torch.float32
        return
    assert absmax_NG.dtype == torch.uint8
    _assert_table(absmax_scales, -(-N * G // ABSMAX_BLOCK))
    _assert_table(absmax_offset, 1)
    _assert_table(absmax_map, 256)


def _assert_table(table: Tensor | None, entries: int) -> None:
    assert table is not None
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert table.numel() == entries, (table.shape, entries)
