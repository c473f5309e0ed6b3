"""Sharding with FSDP2. The only caller of ``fully_shard`` in the project; the gather is :mod:`exact_all_gather`'s."""

import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qsharded.distributed.exact_all_gather import use_exact_gather
from qsharded.models import parts
from qsharded.utils.argument_kinds import refuse_other_kind


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
        ValueError: ``model`` is no module, a ``param_dtype`` that would cast packed bytes, or there are no ranks.
    """
    refuse_other_kind(model, nn.Module, "model", "an nn.Module")
    if param_dtype not in (None, torch.bfloat16):
        raise ValueError(f"param_dtype must be None or bfloat16, got {param_dtype}: it would destroy packed NF4 bytes")
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if mesh is None and not dist.is_initialized():
        raise ValueError("there are no ranks: call torch.distributed.init_process_group() first, under torchrun")
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


def keep_gathered(model: nn.Module) -> None:
    """Let the layers of a sharded ``model`` stay whole between forward and backward; freed where none will come."""
    layers = [layer for layer in layers_of(model) if isinstance(layer, FSDPModule)]

    def choose(*_: object) -> None:
        for layer in layers:
            layer.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False)

    model.register_forward_pre_hook(choose)


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
