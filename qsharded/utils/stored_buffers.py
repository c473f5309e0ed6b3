"""Buffers of a module that checkpoints hold beside its parameters."""

from collections.abc import Iterator

from torch import Tensor, nn


def stored_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of those that ``module`` itself has."""
    for name, buffer in module.named_buffers(prefix, recurse=False):
        if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
            yield name, buffer
