"""Which rows of a tensor live on this rank, and how to reach them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from qsharded.utils import collectives


@dataclass(frozen=True)
class RowRange:
    """The rows [start, stop) of a parameter's ``total`` rows that this rank holds, and the group that shares them."""

    start: int
    stop: int
    total: int
    group: dist.ProcessGroup | None

    @property
    def count(self) -> int:
        return self.stop - self.start


def rows_per_rank(total: int, ranks: int) -> int:
    """Rows of ``total`` that FSDP2 and DTensor give to each of ``ranks``; the last ones may have fewer, or none."""
    return -(-total // ranks)


def rows_of_rank(total: int, ranks: int, rank: int) -> tuple[int, int]:
    """(start, stop): FSDP2 and DTensor cut dim 0 into equal runs, the last ones shorter or empty."""
    step = rows_per_rank(total, ranks)
    start = min(rank * step, total)
    return start, min(start + step, total)


def shard_size_and_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """(ranks, rank) among those that share a model's rows: the last dimension of ``mesh``."""
    dim = mesh.ndim - 1
    return mesh.size(dim), mesh.get_local_rank(dim)


def own_rows(parameter: Tensor) -> RowRange:
    """Which rows of ``parameter`` live here; all of them where it is not sharded."""
    total = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return RowRange(0, total, total, None)
    dim = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
    mesh = parameter.device_mesh
    start, stop = rows_of_rank(total, mesh.size(dim), mesh.get_local_rank(dim))
    return RowRange(start, stop, total, mesh.get_group(dim))


def gathered_rows(own: Tensor, total: int, group: dist.ProcessGroup | None) -> Tensor:
    """The ``total`` rows of which each rank of ``group`` has its :func:`rows_of_rank`, byte for byte: a collective."""
    padded = own.new_zeros(rows_per_rank(total, collectives.size(group)), *own.shape[1:])
    padded[: own.shape[0]].view(torch.uint8).copy_(own.contiguous().view(torch.uint8))
    return collectives.all_gather(padded.view(torch.uint8), group).view(own.dtype).flatten(0, 1)[:total]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered where it is sharded: a collective. Never for packed weights, which stay sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
