"""The format's sizes, and what every backend assumes of its arguments. Users' mistakes are caught further up."""

import torch
from torch import Tensor

BLOCK = 64  # weights that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a second-level scale
LEVELS = 16
MIDPOINTS = LEVELS - 1
ABSMAX_THRESHOLDS = 255
STATE_BLOCK = 256  # values of an optimizer's moment that share a scale
ZERO_CODE = 127  # of the signed 8-bit map
COEFFICIENTS = 9  # of a parameter in an optimizer step
TABLE_COLUMNS = 4  # parameter, gradient, count, origin
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


def assert_state(
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor | None,
    absmax2: Tensor | None,
    row_of_block: Tensor,
    table: Tensor,
    coefficients: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """What an optimizer step assumes of its memory."""
    blocks, parameters = row_of_block.numel(), table.shape[0]
    assert row_of_block.dtype == torch.int32
    assert row_of_block.is_contiguous()
    for state, absmax in ((state1, absmax1), (state2, absmax2)):
        assert state.dtype == (torch.float32 if absmax is None else torch.uint8)
        assert state.numel() == blocks * STATE_BLOCK, (state.shape, blocks)
        assert state.is_contiguous()
        if absmax is not None:
            _assert_table(absmax, blocks)
    assert (table.dtype, table.shape) == (torch.int64, (parameters, TABLE_COLUMNS)), table.shape
    assert table.is_contiguous()
    _assert_table(coefficients, parameters * COEFFICIENTS)
    for entries, values in zip((256, 256, 255, 255), tables, strict=True):
        _assert_table(values, entries)


def _assert_table(table: Tensor | None, entries: int) -> None:
    assert table is not None
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert table.numel() == entries, (table.shape, entries)
