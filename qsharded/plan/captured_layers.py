"""The memory of one micro-batch of a model that transformers' code computes.

Its layers take arguments of their own, so they are captured from a forward of the model on the meta device. The first
layer of each kind is then simulated alone, for all of its kind.

Axes: B rows of a micro-batch, S tokens of a row, D hidden size.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qsharded.checkpoint.load import skeleton
from qsharded.fused.forwards import layer_forwards
from qsharded.lora.config import LoRAConfig
from qsharded.models import CausalLM
from qsharded.models.parts import layers_of
from qsharded.models.transformers_code.description import TransformersConfig
from qsharded.plan.activations import StepWork, Work, give_gradients, simulate
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.utils.checkpointing_modes import Checkpointing, Mode
from qsharded.utils.documents import Boundaries


class CannotPlan(ValueError):
    """A model that cannot run without values."""


@dataclass
class _Call:
    """What a layer is called with beside its input, and how many results it has in a tuple; 0: a tensor alone."""

    others: tuple[Any, ...]
    named: dict[str, Any]
    results: int

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.others, self.named)) if isinstance(leaf, Tensor)]

    def result(self, x_BSD: Tensor) -> Any:
        """``x_BSD`` as the layer would return it."""
        return (x_BSD, *[None] * (self.results - 1)) if self.results else x_BSD


def step_work(
    config: TransformersConfig,
    lora: LoRAConfig,
    dtype: torch.dtype,
    *,
    rows: int,
    length: int,
    checkpointing: Mode,
    is_sharded: bool,
    quant_format: QuantFormat = NF4_64,
) -> StepWork:
    """As :func:`qsharded.plan.activations.step_work`; ``layer`` is what one keeps in the mean, and the most that one
    takes.

    Raises:
        CannotPlan: the model's code asks for values, which the meta device does not have.
    """
    of_step = dataclasses.replace(lora, dtype=dtype if is_sharded else lora.dtype)
    model = skeleton(config, of_step, dtype, quant_format=quant_format).train()
    with torch.device("meta"):
        ids_BS = torch.zeros(rows, length, dtype=torch.int64)
        x_BSD = torch.zeros(rows, length, config.hidden_size, dtype=dtype)
    layers = list(layers_of(model))
    calls = _captured(model, layers, ids_BS)
    if not is_sharded:
        give_gradients(model)
    kinds = [_kind(layer) for layer in layers]
    works = {
        kind: _layer_work(model, layers[index], calls[index], x_BSD, checkpointing)
        for kind, index in {kind: kinds.index(kind) for kind in kinds}.items()
    }
    shared = {tensor.untyped_storage()._cdata: tensor.nbytes for call in calls for tensor in call.tensors()}
    loss = _loss_work(model, layers, calls, ids_BS, x_BSD)
    return StepWork(_mean(works, Counter(kinds)), loss, x_BSD.nbytes + sum(shared.values()), boundary=x_BSD.nbytes)


def _captured(model: CausalLM, layers: list[nn.Module], ids_BS: Tensor) -> list[_Call]:
    """Each layer's call in a forward of packed rows."""
    calls: list[_Call] = []

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        calls.append(_Call(given[1:], named, len(made) if isinstance(made, tuple) else 0))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            boundaries = Boundaries.of_rows(ids_BS.shape[0], ids_BS.shape[1], ids_BS.device)
            model(ids_BS, positions_BS=ids_BS, document_ids_BS=ids_BS, boundaries=boundaries, last_only=True)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise CannotPlan(
            f"its memory cannot be planned: the model's code asks for values on the way ({reason})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _kind(layer: nn.Module) -> Any:
    """What layers that take as much memory have in common."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return type(layer), getattr(layer, "layer_type", None), shapes


def _layer_work(model: CausalLM, layer: nn.Module, call: _Call, x_BSD: Tensor, mode: Mode) -> Work:
    plain = layer.forward
    (layer.forward,) = layer_forwards([layer], [plain], Checkpointing(mode))

    def forward(x_BSD: Tensor) -> Tensor:
        made = layer(x_BSD, *call.others, **call.named)
        result: Tensor = made[0] if call.results else made
        return result

    try:
        return simulate(model, forward, x_BSD)
    finally:
        layer.forward = plain


def _loss_work(model: CausalLM, layers: list[nn.Module], calls: list[_Call], ids_BS: Tensor, x_BSD: Tensor) -> Work:
    """Of all but the layers, which put out what they are given: last norm, head and loss."""

    def loss(x_BSD: Tensor) -> Tensor:
        for layer, call in zip(layers, calls, strict=True):
            layer.forward = lambda *_, call=call, **__: call.result(x_BSD)
        return model(ids_BS, positions_BS=ids_BS, targets_BS=ids_BS)

    return simulate(model, loss, x_BSD)


def _mean(works: dict[Any, Work], counts: Counter[Any]) -> Work:
    kept = sum(works[kind].kept * count for kind, count in counts.items())
    return Work(-(-kept // counts.total()), max(work.passing for work in works.values()))
