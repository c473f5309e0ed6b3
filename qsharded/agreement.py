"""What one rank finds out and all act on: the same value, or the same error, on every rank."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from qsharded.parallel import World

_T = TypeVar("_T")


def main_rank_does(world: World, action: Callable[[], _T]) -> _T:
    """What ``action`` returns on the main rank, on every rank; the others wait for it however long it takes.

    Raises:
        ValueError: with its message on all ranks, where ``action`` raised a ValueError or an OSError.
    """
    result: list[tuple[_T | None, str | None]] = [_attempted(action)] if world.is_main else [(None, None)]
    if world.mesh is not None:
        world.barrier()
        dist.broadcast_object_list(result, src=0, group=world.patient)
    value, refusal = result[0]
    if refusal is not None:
        raise ValueError(refusal)
    return value  # type: ignore[return-value]


def _attempted(action: Callable[[], _T]) -> tuple[_T | None, str | None]:
    try:
        return action(), None
    except (ValueError, OSError) as error:
        return None, str(error)


def first_error(world: World, error: Exception | None) -> str | None:
    """What the first rank whose ``error`` is one says of it, on every rank; None where all went well."""
    said: list[str | None] = [None if error is None else str(error)]
    if world.mesh is not None:
        said = [None] * world.size
        dist.all_gather_object(said, None if error is None else str(error), group=world.patient)
    return next((text for text in said if text is not None), None)
