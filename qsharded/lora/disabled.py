"""The model as it was before its adapters, for a reference beside the one that trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qsharded.lora.layer import lora_layers


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Forwards within are the frozen base model's, without gradients: nothing trains there, and a layer that the
    backward computes again would have its adapter by then.

    Raises:
        ValueError: a module is trained in full: what it was before is not kept.
    """
    layers = dict(lora_layers(model))
    adapters = {parameter for layer in layers.values() for parameter in layer.updates().values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in adapters:
            raise ValueError(f"{name} is trained in full, so that the model without adapters is not at hand any more")
    enabled = {layer: layer.enabled for layer in layers.values()}
    try:
        for layer in enabled:
            layer.enabled = False
        with torch.no_grad():
            yield
    finally:
        for layer, before in enabled.items():
            layer.enabled = before
