"""Bytes of an optimizer's state on one rank."""

from collections.abc import Iterable

from torch import nn

from qsharded.optim.arena import BLOCK_BYTES
from qsharded.optim.paging import BUCKET_BYTES
from qsharded.optim.store import MIN_8BIT_SIZE
from qsharded.quant.blockwise8 import BLOCK
from qsharded.utils.sharding import rows_of_rank

_FP32_BLOCK_BYTES = 2 * BLOCK * 4  # both moments
_COUNTER_BYTES = 4  # the steps of a parameter


def state_bytes(trained: Iterable[nn.Parameter], optim: str, *, ranks: int, rank: int = 0) -> int:
    """What ``--optim`` keeps for ``trained`` parameters, each cut by rows over ``ranks``.

    State in 8 bits may lie in host memory in part, where the GPU has no room for it; here all of it counts.
    """
    if optim == "adamw":
        return sum(2 * _values(parameter, ranks, rank)[1] * parameter.itemsize for parameter in trained)
    return sum(_in_8_bits(parameter, ranks, rank) for parameter in trained)


def pageable_bytes(trained: Iterable[nn.Parameter], optim: str, *, ranks: int) -> int:
    """How much of that host memory may take, on rank 0: 8-bit state, less the two buckets that it comes through."""
    if optim != "paged_adamw8bit":
        return 0
    large = [parameter for parameter in trained if parameter.numel() >= MIN_8BIT_SIZE]
    return max(0, state_bytes(large, optim, ranks=ranks) - len(large) * _COUNTER_BYTES - 2 * BUCKET_BYTES)


def _in_8_bits(parameter: nn.Parameter, ranks: int, rank: int) -> int:
    """Whole blocks of 256 values, by their positions in the whole parameter; small parameters keep fp32 moments."""
    first, count = _values(parameter, ranks, rank)
    blocks = -(-(first % BLOCK + count) // BLOCK) if count else 0
    return blocks * (BLOCK_BYTES if parameter.numel() >= MIN_8BIT_SIZE else _FP32_BLOCK_BYTES) + _COUNTER_BYTES


def _values(parameter: nn.Parameter, ranks: int, rank: int) -> tuple[int, int]:
    """(first, count) of the values of this rank's rows."""
    start, stop = rows_of_rank(parameter.shape[0], ranks, rank)
    row = parameter.numel() // parameter.shape[0]
    return start * row, (stop - start) * row
