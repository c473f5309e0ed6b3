"""What ranks find out, they know together: read by one and told to all, or refused by all in the same words.

A rank that raised alone would leave the others waiting in a collective.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qsharded.distributed.world import World
from qsharded.utils import collectives

_T = TypeVar("_T")
Groups = Sequence[dist.ProcessGroup]


def groups_of(mesh: DeviceMesh | None) -> Groups:
    """The groups of a mesh, the last dimension's first: what is passed on in one after the other reaches every rank."""
    return [] if mesh is None else [mesh.get_group(dim) for dim in reversed(range(mesh.ndim))]


def groups_sharing(parameters: Iterable[Tensor]) -> Groups:
    """The groups of the mesh over which ``parameters`` are cut; none where no parameter is."""
    return groups_of(next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None))


@contextmanager
def refused_by_all(groups: Groups, device: torch.device) -> Iterator[None]:
    """Every rank of ``groups`` runs the block, in which there is no collective, and waits for the others at its end.

    Args:
        groups: as :func:`groups_of` gives them; none for a process alone.
        device: of this rank, where a group has no backend for the CPU.

    Raises:
        ValueError, OSError: the block raised it on some rank. Every rank raises that of the first such rank.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    failures = int(error is not None)
    for group in groups:
        failures = collectives.largest(failures, device, group)
    if failures:
        raise _first(error, groups) from None


def _first(own: ValueError | OSError | None, groups: Groups) -> ValueError | OSError:
    if own is not None and not groups:
        return own
    errors = [own and (isinstance(own, OSError), str(own))]
    for group in groups:
        errors = [error for part in collectives.all_gather_objects(errors, group) for error in part]
    is_of_system, sentence = next(error for error in errors if error)
    return OSError(sentence) if is_of_system else ValueError(sentence)


def found_by_main(world: World, look: Callable[[], _T]) -> _T:
    """What ``look`` returns on the main rank, on every rank. Every rank calls this, and waits however long it takes.

    Raises:
        ValueError: ``look`` raised one, or an OSError; on every rank with its message.
    """
    found = collectives.broadcast_object(_outcome(look) if world.is_main else None, world.long_timeout_group)
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


def first_error(world: World, error: Exception | None) -> str | None:
    """What the first rank whose ``error`` is one says of it, on every rank; None where all went well.

    Every rank calls this, and waits however long it takes: for errors that ranks met apart, beside collectives.
    """
    said = collectives.all_gather_objects(None if error is None else str(error), world.long_timeout_group)
    return next((text for text in said if text is not None), None)
