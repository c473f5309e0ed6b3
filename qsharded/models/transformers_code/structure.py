"""The parts of a transformers model: where they are, and which of its linear layers must stay as they are."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from qsharded.models.parts import PartNames


def find_parts(hf: Any) -> PartNames:
    """Where ``hf``, a causal language model of transformers, keeps its layers, embedding and head.

    Raises:
        ValueError: it has none, or more than one list of layers, or a head that is no linear layer.
    """
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"{_name(hf)} has no embedding of tokens that transformers' get_input_embeddings() gives")
    if type(head) is not nn.Linear:
        raise ValueError(f"{_name(hf)} has no linear output head, which the loss is computed from")
    parts = PartNames(_layers(hf), _name_of(hf, embedding), _name_of(hf, head))
    if "." in parts.head or base_name(parts) == parts.head:
        raise ValueError(f"{_name(hf)} has its head at {parts.head}, not beside a base that makes hidden states")
    return parts


def _layers(hf: Any) -> str:
    """The one list that has as many modules as the configuration says."""
    count = hf.config.get_text_config().num_hidden_layers
    lists = [name for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ValueError(f"{_name(hf)} has {len(outer)} lists of {count} layers ({', '.join(outer)}); one is sharded")
    return outer[0]


def base_name(parts: PartNames) -> str:
    """The child that makes hidden states of tokens: the one that holds the layers."""
    return parts.layers.partition(".")[0]


def _name_of(hf: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in hf.named_modules() if module is wanted)


def _name(hf: Any) -> str:
    return type(hf).__name__


def kept_whole(hf: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers that can be neither packed nor adapted: those of which the model's code reads the weight itself,
    past the layer's forward, and subclasses of nn.Linear, which may compute something else."""
    for module in hf.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            yield module
            continue
        source = _source(type(module))
        for name, child in module.named_children():
            if type(child) is nn.Linear and f"self.{name}.weight" in source:
                yield child


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind) if kind.__module__.startswith("transformers.") else ""
    except OSError:
        return ""
