"""Bring a model's parameters to where its layout wants them, and check that they are there."""

import functools
from collections.abc import Set

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qsharded.distributed import vocab_parallel
from qsharded.distributed.choose_layout import SHARDED, Layout, is_vocab_parallel
from qsharded.distributed.cpu_offload import OffloadedWeights
from qsharded.distributed.fsdp import keep_gathered, layers_of, shard
from qsharded.fused.forwards import layer_forwards
from qsharded.models import CausalLM
from qsharded.utils.checkpointing_modes import KEEP_ALL, Checkpointing
from qsharded.utils.sharding import local, rows_of_rank, rows_per_rank, shard_size_and_rank


def parallelize(
    model: CausalLM,
    mesh: DeviceMesh | None,
    device: torch.device,
    *,
    layout: Layout = SHARDED,
    checkpointing: Checkpointing = KEEP_ALL,
    param_dtype: torch.dtype | None = None,
) -> None:
    """Bring a ``model`` on the meta device into memory, each rank its part, with nothing in it yet.

    Raises:
        ValueError: weights on the host, and layers that are not recomputed in full.
        RuntimeError: a parameter of which this rank holds more or less than its share, named.
    """
    _refuse_saved_weights(layout, checkpointing, len(list(layers_of(model))))
    placed = (
        vocab_parallel.parallelize_vocabulary(model, mesh)
        if is_vocab_parallel(model, layout, mesh is not None)
        else set()
    )
    layers = list(layers_of(model))
    forwards, present = [layer.forward for layer in layers], None
    if layout.on_host:
        weights = OffloadedWeights(layers, mesh)
        forwards, present = weights.forwards, weights.present
        placed |= set(weights.parameters())
    # The layer's forward is replaced, not the layer: names stay, and FSDP2's hooks stay outside the recomputation.
    for layer, forward in zip(layers, layer_forwards(layers, forwards, checkpointing, present), strict=True):
        layer.forward = forward
    if mesh is not None:
        shard(model, mesh, param_dtype=param_dtype, replicate_frozen=layout.replicated)
        if layout.keeps_gathered:
            keep_gathered(model)
    materialize(model, device, on_host=placed if layout.on_host else frozenset())
    model.tie_weights()  # each module got a parameter of its own
    check_shares(model, mesh, layout)


def _refuse_saved_weights(layout: Layout, checkpointing: Checkpointing, layers: int) -> None:
    saving = [mode for mode in checkpointing.modes(layers) if mode in ("none", "selective")]
    if layout.on_host and saving:
        raise ValueError(
            f"weights on the host go with the checkpointing full or offloaded of all layers, got {saving[0]}: what a "
            "layer saves would keep its weights on the device"
        )


def materialize(model: nn.Module, device: torch.device, on_host: Set[nn.Parameter] = frozenset()) -> None:
    """Memory for a ``model`` on the meta device, as ``to_empty`` gives it, but for the parameters ``on_host``.

    What stays on the host of a GPU is pinned, so that copies of it run beside the compute. A tied weight gets its
    memory once, under a parameter for each of its modules.
    """

    @functools.cache
    def empty(tensor: Tensor) -> Tensor:
        if tensor in on_host:
            return torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
        return torch.empty_like(tensor, device=device)

    model._apply(empty)


def check_shares(model: nn.Module, mesh: DeviceMesh | None, layout: Layout = SHARDED) -> None:
    """Compare the bytes that this rank holds of every parameter with its share under ``layout``.

    Raises:
        RuntimeError: they differ; the first parameter is named.
    """
    for name, parameter in model.named_parameters():
        replicated = layout.replicated and not parameter.requires_grad
        ranks, rank = (1, 0) if mesh is None or replicated else shard_size_and_rank(mesh)
        row_bytes = parameter.shape[1:].numel() * parameter.itemsize
        start, stop = rows_of_rank(parameter.shape[0], ranks, rank)
        room = rows_per_rank(parameter.shape[0], ranks) * row_bytes  # FSDP2 pads the last ranks' shards
        own = local(parameter)
        if own.nbytes != (stop - start) * row_bytes or own.untyped_storage().nbytes() > room:
            raise RuntimeError(
                f"this rank holds {own.nbytes:,} bytes of {name} in a storage of "
                f"{own.untyped_storage().nbytes():,}, its share is {(stop - start) * row_bytes:,}"
            )
