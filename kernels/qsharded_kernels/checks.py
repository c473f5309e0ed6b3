"""The format's sizes, and what every backend assumes of its arguments. Users' mistakes are caught further up."""

import torch
from torch import Tensor

BLOCK = 64  # weights that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a second-level scale
LEVELS = 16
MIDPOINTS = LEVELS - 1
ABSMAX_THRESHOLDS = 255
ALIGNMENT = 16  # bytes that a GPU's thread reads or writes at a time


def second_level_blocks(values: int) -> int:
    """How many second-level blocks hold so many absmax values."""
    return -(-values // ABSMAX_BLOCK)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and beginning where a GPU's wide accesses may; a copy only of a view that does not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


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
    _assert_table(absmax_scales, second_level_blocks(N * G))
    _assert_table(absmax_offset, 1)
    _assert_table(absmax_map, 256)


def assert_out(out_NK: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What a kernel assumes of the memory that it is given to fill."""
    assert (tuple(out_NK.shape), out_NK.dtype) == (shape, dtype), (out_NK.shape, out_NK.dtype, shape, dtype)
    assert out_NK.is_contiguous()
    assert out_NK.data_ptr() % ALIGNMENT == 0


def assert_absmax(absmax_NG: Tensor, thresholds: Tensor) -> None:
    """What double quantization assumes."""
    assert absmax_NG.dtype == torch.float32
    assert absmax_NG.is_contiguous()
    _assert_table(thresholds, ABSMAX_THRESHOLDS)


def _assert_table(table: Tensor | None, entries: int) -> None:
    assert table is not None
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert table.numel() == entries, (table.shape, entries)
