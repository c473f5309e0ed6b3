"""The ranks of a run: how this process joins them, which device is its own, and their mesh."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qsharded.utils import collectives

_T = TypeVar("_T")
_LONG_TIMEOUT = timedelta(days=7)  # for downloads and the like; collectives of training have PyTorch's own time-outs


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank among ``size``, its device, and the mesh (None for a single process).

    ``local_rank`` is its number on its node; ``long_timeout_group`` the group of all ranks in which they
    wait for what one of them prepares, such as a download: where none is given, that of all collectives.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    local_rank: int = 0
    long_timeout_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.long_timeout_group is None:
            object.__setattr__(self, "long_timeout_group", self.group)

    @classmethod
    def single_process(cls, device: torch.device) -> "World":
        """A single process."""
        return cls(0, 1, device, None)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, for collectives of tensors; None for a single process."""
        return None if self.mesh is None else dist.group.WORLD

    def barrier(self) -> None:
        """Wait for all ranks, however long one prepares what it does next."""
        collectives.barrier(self.long_timeout_group)

    def first_on_node(self, prepare: Callable[[], _T]) -> _T:
        """What ``prepare`` returns, called by one rank of each node before the others, which find what it downloaded.

        Every rank calls this. Where the first fails the others try too, and fail alike.
        """
        if self.local_rank == 0:
            try:
                return prepare()
            finally:
                self.barrier()
        self.barrier()
        return prepare()


def start_world(timeout: timedelta | None = None) -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, a world of one.

    Args:
        timeout: of the collectives; None leaves PyTorch's own.

    Raises:
        ValueError: no GPU is left for this rank, or the environment describes no group.
        RuntimeError: PyTorch's, where the ranks do not find each other or a GPU does not answer.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        _check_enough_gpus(local_rank)
        let_reserved_memory_grow()
        torch.cuda.set_device(device)
    if size == 1:
        return World.single_process(device)
    # gloo beside NCCL: offloaded shards and small host values are gathered on the CPU
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return World(dist.get_rank(), size, device, mesh, local_rank, dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT))


def let_reserved_memory_grow() -> None:
    """Else what is reserved is cut into blocks to fit, and a model that comes from the host has half as much again
    reserved as it allocates. PyTorch reads this when it allocates first; what the user has set stays."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _check_enough_gpus(local_rank: int) -> None:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this machine has {gpus}; give torchrun --nproc-per-node "
            f"{gpus}, or let it see more of them in CUDA_VISIBLE_DEVICES"
        )


def stop_world(world: World) -> None:
    """Leave the process group."""
    if world.mesh is not None:
        gc.collect()  # a sharded model refers to itself in circles, and holds the group until they are found
        dist.destroy_process_group()


def mesh_of(world: World, replicas: int) -> DeviceMesh | None:
    """The ranks as one mesh, or for HSDP as ``replicas`` rows of it, each of which holds the model once.

    Raises:
        ValueError: the ranks cannot be divided so.
    """
    if replicas == 1:
        return world.mesh
    if world.size % replicas:
        raise ValueError(f"--dp-replicate {replicas} does not divide the {world.size} ranks")
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
