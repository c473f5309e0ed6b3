"""AdamW on moments kept in 8 bits by the compiled library (csrc/cuda/adamw8bit.cu): one launch for many parameters.

The bytes are those of ``qsharded.optim.reference``.
"""

from collections.abc import Sequence
from ctypes import addressof, c_float
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import adamw8bit_checks as checks
from . import cuda, library

BINS = 2945  # QSHARDED_ADAMW8BIT_BINS in csrc/qsharded.h
_FIRST_BIN = 0x3400  # the upper half of 2^-23


def update(
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor | None,
    absmax2: Tensor | None,
    first_block: int,
    row_of_block: Tensor,
    table: Tensor,
    coefficients: Tensor,
    skip: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> None:
    """As ``triton_adamw8bit.update``."""
    checks.assert_state(state1, state2, absmax1, absmax2, row_of_block, table, coefficients, skip, tables)
    map1, map2, thresholds1, thresholds2 = tables
    cuda.call(
        "adamw8bit",
        *(state1, state2, absmax1, absmax2, first_block, row_of_block.numel(), row_of_block),
        *(table, coefficients, skip, map1, map2),
        *(_search(thresholds1, True), _search(thresholds2, False), library.DTYPES[dtype]),
    )


def update_alone(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Sequence[float],
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """One step of one parameter [n], n a multiple of 256, whose state this is, without a copy to the GPU.

    ``gradient``: of the parameter's type. ``state1``, ``state2``: uint8 [n], on the GPU or in memory that it manages.
    ``absmax1``, ``absmax2``: fp32 [n / 256]. ``coefficients``: nine numbers, as the reference has them. ``tables``: as
    in :func:`update`. A value whose gradient is not finite stays as it is, and its moments become 0.
    """
    count, (map1, map2, thresholds1, thresholds2) = parameter.numel(), tables
    checks.assert_alone(parameter, gradient, state1, state2, absmax1, absmax2, coefficients)
    on_host = (c_float * checks.COEFFICIENTS)(*coefficients)
    cuda.call(
        "adamw8bit_alone",
        *(parameter, gradient, count),
        *(state1.data_ptr(), state2.data_ptr(), absmax1, absmax2, addressof(on_host)),
        *(map1, map2, _search(thresholds1, True), _search(thresholds2, False), library.DTYPES[parameter.dtype]),
    )


@cache
def _search(thresholds: Tensor, signed: bool) -> Tensor:
    return search(thresholds.cpu(), signed).to(thresholds.device)


def search(thresholds: Tensor, signed: bool) -> Tensor:
    """int32 [2 if signed else 1, 2945], from thresholds on the CPU: what the bits of a magnitude are added to, by its
    bin, for the sum to have the code in bits 16 to 23. Row 1 gives 255 less the code of a value below zero."""
    bits = thresholds[thresholds > 0].view(torch.int32).long()
    if not signed:
        return _entries(bits + 1, 0)[None]  # + 1: a magnitude at a threshold has the code below it
    # below zero codes are at most ZERO_CODE - 1, however small the magnitude, and 0, however large
    below_zero = _entries(bits[1:-1], 255 - (checks.ZERO_CODE - 1))
    return torch.stack([_entries(bits + 1, checks.ZERO_CODE), below_zero])


def _entries(steps: Tensor, first: int) -> Tensor:
    """``steps``: the bits of the magnitudes from which on the code is one more, ``first`` at the beginning."""
    bins = (torch.arange(BINS) + _FIRST_BIN) << 16
    passed = torch.searchsorted(steps, bins, right=True)
    to_next = F.pad(steps, (0, 1), value=2**31)[passed] - bins
    carry = torch.where(to_next < 1 << 16, (1 << 16) - to_next, 0)  # the sum's lower half overflows from the step on
    return (((first + passed) << 16) + carry - bins).int()
