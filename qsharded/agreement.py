"""One rank looks, all know: what is read from files once, and refused in the same words everywhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist

from qsharded.parallel import World

_T = TypeVar("_T")


def found_by_main(world: World, look: Callable[[], _T]) -> _T:
    """What ``look`` returns on the main rank, on every rank. Every rank calls this, and waits however long it takes.

    Raises:
        ValueError: ``look`` raised one, or an OSError; on every rank with its message.
    """
    outcome = [_outcome(look) if world.is_main else None]
    if world.mesh is not None:
        dist.broadcast_object_list(outcome, src=0, group=world.patient)
    found = outcome[0]
    if isinstance(found, _Complaint):
        raise ValueError(found.message)
    return cast(_T, found)


@dataclass(frozen=True)
class _Complaint:
    message: str


def _outcome(look: Callable[[], _T]) -> _T | _Complaint:
    try:
        return look()
    except (ValueError, OSError) as error:
        return _Complaint(str(error))
