"""AdamW on moments kept in 8 bits by the compiled library (csrc/cuda/adamw8bit.cu): one launch for many parameters.

The bytes are those of ``qsharded.optim.reference``.
"""

from collections.abc import Sequence
from ctypes import addressof, c_float
from functools import cache

import torch
from torch import Tensor

from . import adamw8bit_checks, cuda, library

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
    adamw8bit_checks.assert_state(state1, state2, absmax1, absmax2, row_of_block, table, coefficients, skip, tables)
    _, _, thresholds1, thresholds2 = tables
    cuda.call(
        "adamw8bit",
        *(state1, state2, absmax1, absmax2, first_block, row_of_block.numel(), row_of_block),
        *(table, coefficients, skip, *tables),
        *(_below(thresholds1), _below(thresholds2), library.DTYPES[dtype]),
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
    adamw8bit_checks.assert_alone(parameter, gradient, state1, state2, absmax1, absmax2, coefficients)
    on_host = (c_float * adamw8bit_checks.COEFFICIENTS)(*coefficients)
    cuda.call(
        "adamw8bit_alone",
        *(parameter, gradient, count),
        *(state1.data_ptr(), state2.data_ptr(), absmax1, absmax2, addressof(on_host)),
        *(map1, map2, thresholds1, thresholds2),
        *(_below(thresholds1), _below(thresholds2), library.DTYPES[parameter.dtype]),
    )


@cache
def _below(thresholds: Tensor) -> Tensor:
    """uint8 [2945]: how many of the thresholds above zero lie below each bin."""
    return below(thresholds.cpu()).to(thresholds.device)


def below(thresholds: Tensor) -> Tensor:
    """The same for thresholds on the CPU."""
    edges = ((torch.arange(BINS, dtype=torch.int32) + _FIRST_BIN) << 16).view(torch.float32)
    return torch.searchsorted(thresholds[thresholds > 0], edges).to(torch.uint8)
