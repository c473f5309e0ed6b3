"""Buffers that no checkpoint holds (rotary frequencies, mostly), as the model's own code initialises them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def tensors_beside(hf: nn.Module) -> Iterator[str]:
    """Names of tensors that modules hold as plain attributes: nothing brings them from the meta device."""
    for prefix, module in hf.named_modules():
        yield from (f"{prefix}.{name}" for name, value in vars(module).items() if isinstance(value, Tensor))


def unstored(module: nn.Module) -> list[str]:
    """The names of the buffers of ``module`` itself that checkpoints leave out."""
    return [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]


@torch.no_grad()
def initialise(hf: Any) -> None:
    """Fill them, in memory already; parameters and stored buffers stay as they are.

    Raises:
        ValueError: the model's code leaves one of them unset.
    """
    for module in hf.modules():
        for name in unstored(module):
            _spoil(module.get_buffer(name))
    _protect(hf)
    for owner, module in list(_with_owners(hf, hf)):
        if unstored(module):
            owner._init_weights(module)
    if list(_unset(hf)):  # some models set those of their layers themselves
        for model in [module for module in hf.modules() if isinstance(module, PreTrainedModel)]:
            model._init_weights(model)
    for name in _unset(hf):
        raise ValueError(f"{type(hf).__name__} does not say how its buffer {name} begins, which no checkpoint holds")


def _with_owners(module: nn.Module, owner: Any) -> Iterator[tuple[Any, nn.Module]]:
    """Each module with the model whose code initialises it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield owner, module
    for child in module.children():
        yield from _with_owners(child, owner)


def _protect(hf: nn.Module) -> None:
    """transformers' initialisers leave alone what bears this mark."""
    for module in hf.modules():
        left_out = unstored(module)
        stored = [buffer for name, buffer in module.named_buffers(recurse=False) if name not in left_out]
        for tensor in (*module.parameters(recurse=False), *stored):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def _spoil(buffer: Tensor) -> None:
    if buffer.is_floating_point():
        buffer.fill_(torch.nan)


def _unset(hf: nn.Module) -> Iterator[str]:
    """The names of those that are still spoiled."""
    for prefix, module in hf.named_modules():
        for name in unstored(module):
            buffer = module.get_buffer(name)
            if buffer.is_floating_point() and bool(buffer.isnan().any()):
                yield f"{prefix}.{name}"
