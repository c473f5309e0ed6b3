"""The bytes of a model's parameters on one rank, by class, from the real model built on the meta device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsharded import parallel
from qsharded.models import CausalLM
from qsharded.nn import NF4Linear

CODES, SCALES, EMBEDDING, OTHERS, ADAPTERS = "codes", "scales", "embedding and head", "norms and others", "adapters"
"""Classes of parameters. Adapters are everything that trains; others are frozen and in 16 or 32 bits."""


@dataclass(frozen=True)
class Parameters:
    """Bytes on one rank by class, and what of them is gathered at a time.

    Attributes:
        resident: class -> bytes.
        block: the largest block's bytes when it is gathered; 0 where nothing is sharded.
        vocabulary: the largest bytes of embedding or head when they are gathered; 0 where they stay where they are.
        block_gradient: fp32 bytes of the largest block's gradients before they are scattered, plus this rank's part.
    """

    resident: dict[str, int]
    block: int
    vocabulary: int
    block_gradient: int


def parameters(model: CausalLM, *, ranks: int, rank: int = 0, param_dtype: torch.dtype | None = None) -> Parameters:
    """What ``rank`` of ``ranks`` holds of a model on the meta device; rank 0 holds the most.

    Args:
        model: as ``checkpoint.load.skeleton`` makes it.
        ranks: that share the model; 1 is a model that is not sharded.
        rank: whose bytes are asked for.
        param_dtype: as for ``parallel.shard``.
    """
    resident = dict.fromkeys((CODES, SCALES, EMBEDDING, OTHERS, ADAPTERS), 0)
    for name, tensor in _tensors(model):
        resident[name] += own_bytes(tensor, ranks, rank)
    layers = set(model.model.layers)
    blocks = [modules for modules in parallel.groups(model) if modules[0] in layers]
    others = [modules for modules in parallel.groups(model) if modules[0] not in layers]
    is_sharded = ranks > 1
    return Parameters(
        resident,
        block=is_sharded * max(_gathered(modules, ranks, param_dtype) for modules in blocks),
        vocabulary=is_sharded * max((_gathered(modules, ranks, param_dtype) for modules in others), default=0),
        block_gradient=is_sharded * max(_reduced(modules, ranks) for modules in blocks),
    )


def own_bytes(tensor: Tensor, ranks: int, rank: int) -> int:
    """Of a parameter the bytes of the rank's rows; a buffer is whole on every rank."""
    if not isinstance(tensor, nn.Parameter) or tensor.dim() == 0:
        return tensor.nbytes
    start, stop = parallel.rows_of_rank(tensor.shape[0], ranks, rank)
    return tensor[:1].nbytes * (stop - start) if tensor.shape[0] else 0


def _tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """(class, tensor) of every parameter, a tied one once, and of every buffer."""
    seen: set[Tensor] = set()
    for prefix, module in model.named_modules():
        named = [*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False)]
        for name, tensor in named:
            if tensor not in seen:
                seen.add(tensor)
                yield _class_of(module, name, tensor), tensor


def _class_of(module: nn.Module, name: str, tensor: Tensor) -> str:
    if tensor.requires_grad:
        return ADAPTERS
    if isinstance(module, NF4Linear) and tensor is not module.bias:
        return CODES if tensor is module.weight else SCALES
    return EMBEDDING if name.startswith(("model.embed_tokens.", "lm_head.")) else OTHERS


def _gathered(modules: list[nn.Module], ranks: int, param_dtype: torch.dtype | None) -> int:
    """Bytes of a group once gathered. FSDP2 pads every rank's part to as many rows as the first has."""
    return sum(
        own_bytes(parameter, ranks, 0) * ranks // parameter.itemsize * _gathered_itemsize(parameter, param_dtype)
        for parameter in _distinct(modules)
    )


def _gathered_itemsize(parameter: Tensor, param_dtype: torch.dtype | None) -> int:
    return parameter.itemsize if param_dtype is None else param_dtype.itemsize


def _reduced(modules: list[nn.Module], ranks: int) -> int:
    trained = [own_bytes(p, ranks, 0) // p.itemsize for p in _distinct(modules) if p.requires_grad]
    return sum(trained) * torch.float32.itemsize * (ranks + 1)


def _distinct(modules: list[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}
