"""Collectives on a group of ranks, or on this process alone where ``group`` is None. Axis: W ranks of the group.

Nothing else in qsharded calls those of ``torch.distributed`` (a test looks).
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")

# 2.13 renames both and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def every_rank() -> dist.ProcessGroup | None:
    """The group of all ranks; None where no process group was started."""
    return dist.group.WORLD if dist.is_initialized() else None


def size(group: dist.ProcessGroup | None) -> int:
    """W."""
    return 1 if group is None else group.size()


def rank(group: dist.ProcessGroup | None) -> int:
    """This process's place among the W."""
    return 0 if group is None else group.rank()


def all_gather_into(output: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
    """Fill ``output`` with every rank's ``own``, one after the other."""
    return _all_gather(output, own, group=group, async_op=async_op)


def all_gather(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's ``own``, [W, ...]."""
    if group is None:
        return own[None]
    output = own.new_empty(group.size(), *own.shape)
    all_gather_into(output.flatten(), own.contiguous().flatten(), group)
    return output


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks of the part, out of ``parts`` [W, ...], that is meant for this one."""
    if group is None:
        return parts[0]
    output = torch.empty_like(parts[0])
    _reduce_scatter(output.flatten(), parts.contiguous().flatten(), group=group)
    return output


def all_to_all(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[W, ...]: from each rank the part, out of its ``parts`` [W, ...], that is meant for this one."""
    if group is None:
        return parts
    output = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(output, parts.contiguous(), group=group)
    return output


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    """``tensor``, reduced over the ranks in place."""
    if group is not None:
        dist.all_reduce(tensor, op, group=group)
    return tensor


def largest(count: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """The largest of the ranks' counts. Asked on the CPU where the group can, so that a GPU need not be waited for."""
    if group is None:
        return count
    asked_on = "cpu" if "cpu:" in str(dist.get_backend_config(group)) else device
    return int(all_reduce(torch.tensor(count, device=asked_on), dist.ReduceOp.MAX, group))


def barrier(group: dist.ProcessGroup | None) -> None:
    """Wait for the other ranks."""
    if group is not None:
        dist.barrier(group)


def all_gather_objects(own: _T, group: dist.ProcessGroup | None) -> list[_T]:
    """Every rank's ``own``, pickled on its way: for what ranks tell each other, not for tensors."""
    gathered = [own] * size(group)
    if group is not None:
        dist.all_gather_object(gathered, own, group=group)
    return gathered


def broadcast_object(own: _T, group: dist.ProcessGroup | None) -> _T:
    """The ``own`` of the group's first rank; what the others give does not matter."""
    if group is None:
        return own
    values = [own]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]
