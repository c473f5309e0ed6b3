"""AdamW on moments kept in 8 bits by the compiled library (csrc/cuda/adamw8bit.cu): one launch for many parameters.

The bytes are those of ``qsharded.optim.reference``.
"""

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


@cache
def _below(thresholds: Tensor) -> Tensor:
    """uint8 [2945]: how many of the thresholds above zero lie below each bin."""
    return below(thresholds.cpu()).to(thresholds.device)


def below(thresholds: Tensor) -> Tensor:
    """The same for thresholds on the CPU."""
    edges = ((torch.arange(BINS, dtype=torch.int32) + _FIRST_BIN) << 16).view(torch.float32)
    return torch.searchsorted(thresholds[thresholds > 0], edges).to(torch.uint8)
