"""Sharding with FSDP2 that keeps packed weights bit for bit. The only caller of ``fully_shard`` in the project.

FSDP2 gathers parameters by copying the shards into one buffer with ``torch._foreach_copy_``. On CUDA that kernel sends
bf16 through fp32, which rewrites NaN patterns, and packed NF4 bytes seen as bf16 are NaN patterns in 0.08% of words
(pytorch#159333, bitsandbytes#1945). :class:`ExactAllGather` has the copy done on integer views instead, by public
means: ``FSDPModule.set_custom_all_gather``.
"""

import functools
import gc
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qsharded import collectives, vocabulary
from qsharded.autograd import recompute
from qsharded.models import CausalLM
from qsharded.shards import RowRange as RowRange
from qsharded.shards import local as local
from qsharded.shards import own_rows as own_rows
from qsharded.shards import rows_of_rank
from qsharded.shards import whole as whole
from qsharded.streaming import HostWeights

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


class ExactAllGather:
    """FSDP2's all-gather with no arithmetic on the way: integer copies in, bytes over the wire.

    It raises RuntimeError where PyTorch filled the buffer in a way unknown to it: such a run stops, it does not damage.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).as_subclass(_GatherBuffer)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if type(input_tensor) is not _FilledAsIntegers:
            raise RuntimeError(
                f"PyTorch {torch.__version__} filled FSDP2's gather buffer in a way qsharded does not know, which may "
                "damage packed weights; use a PyTorch version that qsharded supports"
            )
        own = input_tensor.as_subclass(torch.Tensor).view(torch.uint8)
        return collectives.all_gather_into(output_tensor.view(torch.uint8), own, group, async_op)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank among ``size``, its device, and the mesh (None for a single process)."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier()


def start_world() -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, a world of one."""
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        _check_enough_gpus(local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 1, device, None)
    # gloo beside NCCL: offloaded shards and small host values are gathered on the CPU
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return World(dist.get_rank(), size, device, mesh)


def _check_enough_gpus(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}")


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


def least_memory(world: World) -> int:
    """Bytes of the smallest GPU among the ranks' own, or of a rank's part of a machine's memory where there is none."""
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total = machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    least = torch.tensor(total, device=world.device)
    if world.mesh is not None:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def frozen_bytes(model: nn.Module) -> int:
    """What the frozen parameters of ``model`` take where they are whole; a tied one counts once."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)


@dataclass(frozen=True)
class Layout:
    """Where the frozen weights are. What trains is cut over the ranks, and stays on the GPU, in any of them.

    Attributes:
        replicated: whole on every rank; else cut over the ranks.
        on_host: in host memory, from where a block's come while the one before it runs.
        split_vocabulary: embedding and head are never gathered whole; None decides by their size. Only frozen ones can
            be split, and whole ones of which ``replicated`` speaks are not.

    Raises:
        ValueError: replicated and on the host.
    """

    replicated: bool = False
    on_host: bool = False
    split_vocabulary: bool | None = None

    def __post_init__(self) -> None:
        if self.replicated and self.on_host:
            raise ValueError("frozen weights are either replicated, for models that fit, or kept on the host, not both")


SHARDED = Layout()
"""Cut over the ranks, on the GPUs."""


def lay_out(
    model: CausalLM,
    mesh: DeviceMesh | None,
    device: torch.device,
    *,
    layout: Layout = SHARDED,
    checkpointing: recompute.Mode = "none",
    param_dtype: torch.dtype | None = None,
) -> None:
    """Bring a ``model`` on the meta device into memory, each rank its part, with nothing in it yet.

    Raises:
        ValueError: weights on the host, and blocks that are not recomputed in full.
        RuntimeError: a parameter of which this rank holds more or less than its share, named.
    """
    if layout.on_host and checkpointing in ("none", "selective"):
        raise ValueError(
            f"weights on the host go with the checkpointing full or offloaded, got {checkpointing}: what a block saves "
            "would keep its weights on the device"
        )
    on_host: set[nn.Parameter] = set()
    if _splits_vocabulary(model, mesh, layout):
        vocabulary.split_vocabulary(model, mesh)
        if layout.on_host:
            on_host |= {model.get_parameter("model.embed_tokens.weight"), model.get_parameter("lm_head.weight")}
    blocks = list(_blocks(model))
    forwards = [block.forward for block in blocks]
    if layout.on_host:
        weights = HostWeights(blocks, mesh)
        forwards = weights.forwards
        on_host |= set(weights.parameters())
    # The block's forward is replaced, not the block: names stay, and FSDP2's hooks stay outside the recomputation.
    for block, forward in zip(blocks, recompute.recomputed(forwards, checkpointing), strict=True):
        block.forward = forward
    if mesh is not None:
        shard(model, mesh, param_dtype=param_dtype, replicate_frozen=layout.replicated)
    materialize(model, device, on_host)
    model.tie_weights()  # each module got a tensor of its own
    check_shares(model, mesh, layout)


def _splits_vocabulary(model: CausalLM, mesh: DeviceMesh | None, layout: Layout) -> bool:
    if layout.replicated or not vocabulary.can_split(model):
        return False
    if layout.split_vocabulary is not None:
        return layout.split_vocabulary
    return layout.on_host or (mesh is not None and vocabulary.is_large(model))


def materialize(model: nn.Module, device: torch.device, on_host: Collection[nn.Parameter] = ()) -> None:
    """Memory for a ``model`` on the meta device, as ``to_empty`` gives it, but for the parameters ``on_host``.

    What stays on the host of a GPU is pinned, so that copies of it run beside the compute.
    """

    def empty(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) and tensor in on_host:
            return torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
        return torch.empty_like(tensor, device=device)

    model._apply(empty)


def check_shares(model: nn.Module, mesh: DeviceMesh | None, layout: Layout = SHARDED) -> None:
    """Compare the bytes that this rank holds of every parameter with its share under ``layout``.

    Raises:
        RuntimeError: they differ; the first parameter is named.
    """
    for name, parameter in model.named_parameters():
        is_whole = mesh is None or (layout.replicated and not parameter.requires_grad)
        ranks, rank = (1, 0) if is_whole or mesh is None else (mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))
        row_bytes = parameter.shape[1:].numel() * parameter.itemsize
        start, stop = rows_of_rank(parameter.shape[0], ranks, rank)
        room = -(-parameter.shape[0] // ranks) * row_bytes  # FSDP2 pads the last ranks' shards
        own = local(parameter)
        if own.nbytes != (stop - start) * row_bytes or own.untyped_storage().nbytes() > room:
            raise RuntimeError(
                f"this rank holds {own.nbytes:,} bytes of {name} in a storage of "
                f"{own.untyped_storage().nbytes():,}, its share is {(stop - start) * row_bytes:,}"
            )


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    replicate_frozen: bool = False,
) -> nn.Module:
    """Shard ``model`` over ``mesh`` with FSDP2: a group for each block, for the embedding and for the head.

    Args:
        model: has its blocks in ``model.model.layers``; sharded in place, and returned. Parameters that are cut over
            ranks already (DTensors) are left as they are.
        mesh: one-dimensional, or two-dimensional (replicate, shard) for HSDP; all ranks when None.
        param_dtype: what other than packed parameters are cast to when gathered; None leaves them as they are.
        reshard_after_forward: free each gathered block after its forward.
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
    for modules in _groups(model):
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


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    yield from model.get_submodule("model.layers").children()


def _groups(model: nn.Module) -> Iterator[list[nn.Module]]:
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    for block in _blocks(model):
        yield [block]
    weight = getattr(head, "base_layer", head).weight  # under an adapter the head's own lies one deeper
    if embedding.weight is weight:
        yield [embedding, head]  # a tied weight belongs to one group
    else:
        yield [embedding]
        yield [head]
