"""The forwards of a model's layers under a way of checkpointing: fused where a layer can be, else as it is written."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qsharded.fused import one_token
from qsharded.fused.layer import can_fuse, fused_forward
from qsharded.fused.policy import EVERYTHING, LayerInput, Policy
from qsharded.models.activation_checkpointing import Forward, Waiting, recomputed
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.decoder import DecoderLayer
from qsharded.models.kv_cache import KVCache
from qsharded.utils.checkpointing_modes import Checkpointing, Mode

KEPT: dict[Mode, frozenset[str]] = {
    "none": EVERYTHING,
    "selective": frozenset({"qkv", "attention", "h"}),
    "full": frozenset(),
    "offloaded": frozenset(),
}
"""What a fused layer keeps beside its input; with "offloaded" its input is in host memory meanwhile."""

WeightsPresent = Callable[[int, torch.device], Any]


def layer_forwards(
    layers: list[Any],
    plain: list[Forward],
    checkpointing: Checkpointing,
    weights_present: WeightsPresent | None = None,
) -> list[Forward]:
    """The layers' forwards, in their order, each ``(x, inputs, cache=None) -> y``.

    Args:
        layers: the modules.
        plain: their forwards as they are written, for what cannot be fused: dropout, a layer of another
            kind, a cache with more than one token a row.
        checkpointing: what waits for the backward.
        weights_present: with a layer's index and a device: a context in which its modules hold their weights, where
            these are elsewhere between calls. ``plain`` sees to that by itself.
    """
    waiting = Waiting()
    checkpointed = checkpointing.checkpointed(len(layers))
    composed = recomputed(plain[:checkpointed], checkpointing.mode) + plain[checkpointed:]
    forwards: list[Forward] = []
    for index, mode in enumerate(checkpointing.modes(len(layers))):
        if not isinstance(layers[index], DecoderLayer):  # of another library, with arguments of its own
            forwards.append(composed[index])
            continue
        present = None if weights_present is None else partial(weights_present, index)
        keep_input = partial(_away, waiting) if mode == "offloaded" else LayerInput
        policy = Policy(KEPT[mode], keep_input, present)
        forwards.append(partial(_forward, layers[index], composed[index], policy))
    return forwards


def _away(waiting: Waiting, x_BSD: Tensor) -> Any:
    return waiting.store(x_BSD).leave()


def _forward(
    layer: DecoderLayer,
    composed: Forward,
    policy: Policy,
    x_BSD: Tensor,
    inputs: AttentionInputs,
    cache: KVCache | None = None,
) -> Tensor:
    if cache is not None and policy.weights_present is None and one_token.takes(layer, x_BSD, inputs):
        return one_token.forward(layer, x_BSD, inputs, cache)
    plain = cache is None and inputs.query_scale_BS is None
    if plain and _is_recorded(layer, x_BSD) and not _is_watched(x_BSD) and can_fuse(layer):
        return fused_forward(layer, x_BSD, inputs, policy)
    return composed(x_BSD, inputs, cache)


def _is_recorded(layer: DecoderLayer, x_BSD: Tensor) -> bool:
    """Whether a backward will follow: by the input's gradient, or in a model's first layer by what it trains."""
    if not torch.is_grad_enabled():
        return False
    return x_BSD.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def _is_watched(x_BSD: Tensor) -> bool:
    """By a compiler, which sees more in the composition, or by autocast, whose casts the fused layer does not make."""
    return torch.compiler.is_compiling() or (not x_BSD.is_meta and torch.is_autocast_enabled(x_BSD.device.type))
