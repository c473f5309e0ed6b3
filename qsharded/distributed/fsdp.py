"""Sharding with FSDP2 that keeps packed weights bit for bit. The only caller of ``fully_shard`` in the project.

FSDP2 gathers parameters by copying the shards into one buffer with ``torch._foreach_copy_``. On CUDA that kernel sends
bf16 through fp32, which rewrites NaN patterns, and packed NF4 bytes seen as bf16 are NaN patterns in 0.08% of words
(pytorch#159333, bitsandbytes#1945). :class:`ExactAllGather` has the copy done on integer views instead, by public
means: ``FSDPModule.set_custom_all_gather``.
"""

import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qsharded.models import parts
from qsharded.utils import collectives

_T = TypeVar("_T")
_LONG_TIMEOUT = timedelta(days=7)  # for downloads and the like; collectives of training have PyTorch's own time-outs
_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _FilledAsIntegers(torch.Tensor):
    """Marks this rank's part of a gather buffer whose bytes were copied in unchanged."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class _GatherBuffer(torch.Tensor):
    """A gather buffer that meets FSDP2's copy-in and has it done on integer views of inputs and buffer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not torch.ops.fsdp.all_gather_copy_in:
                return func(*args, **(kwargs or {}))
            shards, buffer, split_sizes, numel, rank = args
            plain = buffer.as_subclass(torch.Tensor)
            integer = _INTEGER_OF_WIDTH[plain.itemsize]
            func([shard.view(integer) for shard in shards], plain.view(integer), split_sizes, numel, rank)
            return plain.narrow(0, numel * rank, numel).as_subclass(_FilledAsIntegers), plain


class DamagedGather(RuntimeError):
    """This build of PyTorch gathers shards in a way that may change packed bytes."""


class ExactAllGather:
    """FSDP2's all-gather with no arithmetic on the way: integer copies in, bytes over the wire.

    It raises DamagedGather where PyTorch filled the buffer in a way unknown to it: such a run stops before any damage.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).as_subclass(_GatherBuffer)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if type(input_tensor) is not _FilledAsIntegers:
            raise DamagedGather(
                f"PyTorch {torch.__version__} filled FSDP2's gather buffer in a way qsharded does not know, which may "
                "damage packed weights; use a PyTorch version that qsharded supports"
            )
        own = input_tensor.as_subclass(torch.Tensor).view(torch.uint8)
        return collectives.all_gather_into(output_tensor.view(torch.uint8), own, group, async_op)


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


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    replicate_frozen: bool = False,
) -> nn.Module:
    """Shard ``model`` over ``mesh`` with FSDP2: a group for each layer, for the embedding and for the head.

    Args:
        model: has its layers where ``models.parts`` looks, in PEFT's wrapper or not; sharded in place, and returned.
            Parameters that are cut over ranks already (DTensors) are left as they are.
        mesh: one-dimensional, or two-dimensional (replicate, shard) for HSDP; all ranks when None.
        param_dtype: what other than packed parameters are cast to when gathered; None leaves them as they are.
        reshard_after_forward: free each gathered layer after its forward.
        replicate_frozen: leave what is frozen whole on every rank, and shard what trains.

    Raises:
        ValueError: a ``param_dtype`` that would cast packed bytes.
    """
    if param_dtype not in (None, torch.bfloat16):
        raise ValueError(f"param_dtype must be None or bfloat16, got {param_dtype}: it would destroy packed NF4 bytes")
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = mesh or init_device_mesh(_device_type(model), (dist.get_world_size(),))
    left = {p for p in model.parameters() if isinstance(p, DTensor) or (replicate_frozen and not p.requires_grad)}
    wrap = functools.partial(
        fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, ignored_params=left
    )
    for modules in groups(model):
        if any(parameter not in left for module in modules for parameter in module.parameters()):
            wrap(modules if len(modules) > 1 else modules[0])
    wrap(model)
    use_exact_gather(model)
    return model


def use_exact_gather(model: nn.Module) -> None:
    """Set :class:`ExactAllGather` on every FSDP2 module of ``model``."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(ExactAllGather())  # type: ignore[arg-type]  # its base class is private


def _device_type(model: nn.Module) -> str:
    kind = next(model.parameters()).device.type
    return kind if kind != "meta" else ("cuda" if torch.cuda.is_available() else "cpu")


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers, in their order."""
    yield from parts.layers_of(_unwrapped(model))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model under PEFT's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def groups(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that :func:`shard` gathers together; the whole model's own group of what is left comes after them."""
    inner = _unwrapped(model)
    embedding, head = parts.embedding_of(inner), parts.head_of(inner)
    for layer in layers_of(model):
        yield [layer]
    # under an adapter the layer's own weight lies one deeper
    if getattr(embedding, "base_layer", embedding).weight is getattr(head, "base_layer", head).weight:
        yield [embedding, head]  # a tied weight belongs to one group
    else:
        yield [embedding]
        yield [head]
