"""Which values of a parameter this rank holds."""

from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from qsharded.utils import collectives
from qsharded.utils.sharding import rows_of_rank


def first_value(parameter: Tensor) -> int:
    """Where this rank's values begin among the parameter's, counted in row order.

    0 where they are no run of consecutive values, as after sharding another dimension than 0: blocks of 256 then begin
    with the shard.
    """
    if not isinstance(parameter, DTensor) or not holds_rows(parameter):
        return 0
    mesh, start, rows = parameter.device_mesh, 0, parameter.shape[0]
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            first, stop = rows_of_rank(rows, mesh.size(dim), mesh.get_local_rank(dim))
            start, rows = start + first, stop - first
    return start * prod(parameter.shape[1:])


def holds_rows(parameter: Tensor) -> bool:
    """Whether this rank holds whole consecutive rows, as FSDP2 and HSDP cut them, or everything."""
    if not isinstance(parameter, DTensor):
        return True
    return all(isinstance(placement, Replicate) or placement == Shard(0) for placement in parameter.placements)


def agree_on_maximum(flag: Tensor, parameters: list[Tensor]) -> None:
    """Make ``flag`` the largest of all ranks that share a sharded parameter."""
    meshes = [parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)]
    # each once, and in the same order on all ranks
    for group in dict.fromkeys(mesh.get_group(dim) for mesh in dict.fromkeys(meshes) for dim in range(mesh.ndim)):
        collectives.all_reduce(flag, dist.ReduceOp.MAX, group)
