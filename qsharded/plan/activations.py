"""The memory of one micro-batch: a layer, and the head with its loss, simulated from the model's own code.

Axes: B rows of a micro-batch, S tokens of a row, D hidden size, E head dim.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.checkpoint.load import skeleton
from qsharded.fused.forwards import layer_forwards
from qsharded.lora.config import LoRAConfig
from qsharded.models import CausalLM, ModelConfig
from qsharded.models.attention_inputs import AttentionInputs, Boundaries, attention_inputs
from qsharded.plan.simulation import LiveBytes, as_on_gpu
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.utils.checkpointing_modes import Checkpointing, Mode


@dataclass(frozen=True)
class Work:
    """Bytes of a part of the model: ``kept`` from its forward to its backward, ``passing`` beside them at the worst
    moment."""

    kept: int
    passing: int


@dataclass(frozen=True)
class StepWork:
    """What a micro-batch takes: in each layer (kept on average, passing at most), in head and loss, and ``shared`` by
    all (rotary tables, the embedding's output, and masks where attention needs them). ``boundary``: what lies between
    two layers, among what each keeps."""

    layer: Work
    loss: Work
    shared: int
    boundary: int


def step_work(
    config: ModelConfig,
    lora: LoRAConfig,
    dtype: torch.dtype,
    *,
    rows: int,
    length: int,
    checkpointing: Mode,
    is_sharded: bool,
    quant_format: QuantFormat = NF4_64,
) -> StepWork:
    """Simulate a micro-batch of ``rows`` x ``length`` tokens on a GPU. The first layer of each kind stands for all.

    A sharded model's parameters arrive in ``dtype`` and their gradients are new; an unsharded one's stay in their own
    and add to gradients that are there (counted as the gradients' own class). ``quant_format``: of its packed weights.
    """
    of_all = dataclasses.replace(lora, dtype=dtype if is_sharded else lora.dtype)
    with torch.device("meta"):
        positions_BS = torch.zeros(rows, length, dtype=torch.int64)
        x_BSD = torch.zeros(rows, length, config.hidden_size, dtype=dtype)
        inputs = _packed_rows(config, positions_BS, dtype)
    works: list[Work] = []
    kinds = list(zip(config.is_linear, config.is_sparse, strict=True))
    for first in sorted({kinds.index(kind) for kind in kinds}):
        model = _one_layer(config.of_layers(first), of_all, dtype, checkpointing, quant_format)
        if not is_sharded:
            give_gradients(model)
        one, its_inputs = model.model.layers[0], inputs[first]
        works += [simulate(model, partial(_call, one, its_inputs), x_BSD)] * kinds.count(kinds[first])
    layer = Work(-(-sum(work.kept for work in works) // len(works)), max(work.passing for work in works))
    shared = positions_BS.nbytes + x_BSD.nbytes + _bytes(inputs)
    return StepWork(layer, _loss_work(model, positions_BS, x_BSD), shared, boundary=x_BSD.nbytes)


def _one_layer(
    config: ModelConfig, lora: LoRAConfig, dtype: torch.dtype, mode: Mode, quant_format: QuantFormat
) -> CausalLM:
    # a layer may lack what the configuration names in others
    lora = dataclasses.replace(lora, strict=False)
    model = skeleton(config, lora, dtype, quant_format=quant_format).train()
    one = model.model.layers[0]
    for module in (one, model.model.norm):
        as_on_gpu(module)
    (one.forward,) = layer_forwards([one], [one.forward], Checkpointing(mode))
    return model


def _call(layer: nn.Module, inputs: AttentionInputs, x_BSD: Tensor) -> Tensor:
    y_BSD: Tensor = layer(x_BSD, inputs)
    return y_BSD


def _packed_rows(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> tuple[AttentionInputs, ...]:
    """Of rows that may hold several documents, which takes a mask where no kernel knows of documents."""
    rows, length = positions_BS.shape
    boundaries = Boundaries.of_rows(rows, length, positions_BS.device)
    documents_BS, on_gpu = positions_BS, torch.device("cuda")
    return attention_inputs(
        config, positions_BS, dtype, documents_BT=documents_BS, boundaries=boundaries, device=on_gpu
    )


def _bytes(inputs: Iterable[AttentionInputs]) -> int:
    """Rotary tables and masks, each once for all the layers that share it."""
    tensors = {tensor for made in inputs for tensor in (made.cos_BSR, made.sin_BSR, made.mask_BST)}
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def give_gradients(model: nn.Module) -> None:
    """One for each parameter that trains, as they are there in an unsharded run from its second micro-batch on."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def _loss_work(model: CausalLM, targets_BS: Tensor, x_BSD: Tensor) -> Work:
    norm = model.model.norm
    model.model = _Stack(norm)  # type: ignore[assignment]

    def loss(x_BSD: Tensor) -> Tensor:
        model.model.hidden_BSD = norm(x_BSD)
        return model(targets_BS, targets_BS=targets_BS)

    return simulate(model, loss, x_BSD)


class _Stack(nn.Module):
    """Stands in for a decoder: it puts out the hidden states that it is given."""

    hidden_BSD: Any

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *_: Any) -> Tensor:
        hidden_BSD, self.hidden_BSD = self.hidden_BSD, None
        return hidden_BSD


class _Rest(torch.autograd.Function):
    """Stands in for the rest of a model: it lets go of its input before it puts out a gradient for it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(ctx.shape, dtype=ctx.dtype)


def simulate(model: nn.Module, forward: Callable[[Tensor], Tensor], x_BSD: Tensor) -> Work:
    """Of a forward of ``model``'s, and its backward, on the meta device."""
    x_BSD = x_BSD.clone().requires_grad_()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, x_BSD]) as live:
        y = forward(x_BSD)
        kept = live.now()
        rest = _Rest.apply(y)
        del y
        rest.backward()
    return Work(kept, live.peak - kept)
