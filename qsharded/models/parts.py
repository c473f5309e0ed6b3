"""Where a causal language model keeps its decoder layers, its embedding and its output head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PartNames:
    """Names of modules, as ``get_submodule`` takes them. The defaults are those of most checkpoints, and our own."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"


def part_names(model: nn.Module) -> PartNames:
    """Those of ``model``: its configuration's ``parts``, or the common ones where that has none."""
    names: PartNames = getattr(getattr(model, "config", None), "parts", PartNames())
    return names


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers, in their order."""
    yield from model.get_submodule(part_names(model).layers).children()


def embedding_of(model: nn.Module) -> Any:
    """The embedding, or the adapter around it."""
    return model.get_submodule(part_names(model).embedding)


def head_of(model: nn.Module) -> Any:
    """The output head, or the adapter around it."""
    return model.get_submodule(part_names(model).head)
