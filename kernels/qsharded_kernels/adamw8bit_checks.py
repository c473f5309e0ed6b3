"""The sizes of an 8-bit optimizer's state, and what every backend assumes of its arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

STATE_BLOCK = 256  # values of a moment that share a scale
ZERO_CODE = 127  # of the signed map
COEFFICIENTS = 9  # of a parameter in a step
TABLE_COLUMNS = 4  # parameter, gradient, count, origin
STATE_ALIGNMENT = 4  # bytes: codes are read four at a time


def assert_state(
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor | None,
    absmax2: Tensor | None,
    row_of_block: Tensor,
    table: Tensor,
    coefficients: Tensor,
    skip: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """What a step assumes of the memory it is given."""
    blocks, parameters = row_of_block.numel(), table.shape[0]
    _assert(row_of_block, torch.int32, blocks)
    for state, absmax in ((state1, absmax1), (state2, absmax2)):
        _assert(state, torch.float32 if absmax is None else torch.uint8, blocks * STATE_BLOCK)
        if absmax is not None:
            _assert(absmax, torch.float32, blocks)
    _assert(table, torch.int64, parameters * TABLE_COLUMNS)
    _assert(coefficients, torch.float32, parameters * COEFFICIENTS)
    _assert(skip, torch.float32, 1)
    for entries, values in zip((256, 256, 255, 255), tables, strict=True):
        _assert(values, torch.float32, entries)


def assert_alone(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Sequence[float],
) -> None:
    """What a step of one parameter assumes."""
    count = parameter.numel()
    assert count % STATE_BLOCK == 0, count
    _assert(parameter, parameter.dtype, count)
    _assert(gradient, parameter.dtype, count)
    for state, absmax in ((state1, absmax1), (state2, absmax2)):
        _assert(state, torch.uint8, count)
        assert state.data_ptr() % STATE_ALIGNMENT == 0, state.data_ptr()
        _assert(absmax, torch.float32, count // STATE_BLOCK)
    assert len(coefficients) == COEFFICIENTS, coefficients


def _assert(tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    assert (tensor.dtype, tensor.numel()) == (dtype, count), (tensor.dtype, tensor.shape, dtype, count)
    assert tensor.is_contiguous()
