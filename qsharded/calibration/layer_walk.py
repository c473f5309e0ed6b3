"""A decoder of which one layer at a time is in memory, in 16 or 32 bits, and the activations between its layers.

It asks of a model that its forward calls its layers one after the other with hidden states first, which holds for our
decoders and those of transformers alike.

Axes: R rows, S tokens in a row, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.checkpoint import fill_shards
from qsharded.checkpoint.load import expert_fills_of, plain_fills
from qsharded.checkpoint.row_chunks import WeightSource
from qsharded.models import CausalLM
from qsharded.models.parts import layers_of, part_names
from qsharded.quant.experts import ExpertLinears
from qsharded.quant.formats import QuantFormat
from qsharded.quant.gated_experts import GatedExperts
from qsharded.utils import heartbeat
from qsharded.utils.progress_bar import ProgressBar

_TOKENS_AT_ONCE = 8192


class LayerWalk:
    """Runs rows of tokens through a model, layer by layer.

    Args:
        model: on the meta device, nothing packed.
        source: its weights.
        ids_RS: int64; this rank's rows.
        device: to compute on.
        quant_format: to which experts are rounded as they come, to nearest; None leaves them. Linear layers are the
            caller's.
    """

    def __init__(
        self,
        model: CausalLM,
        source: WeightSource,
        ids_RS: Tensor,
        device: torch.device,
        quant_format: QuantFormat | None = None,
    ) -> None:
        self._model, self._source, self._device, self._quant_format = model, source, device, quant_format
        self.layers = list(layers_of(model))
        self._prefix = part_names(model).layers + "."
        rows = max(1, _TOKENS_AT_ONCE // ids_RS.shape[1])
        self._ids = list(ids_RS.split(rows))
        self._hidden: list[Tensor] = []

    def name(self, layer: int, linear: str) -> str:
        """What a checkpoint calls the weight of a layer's linear."""
        return f"{self._prefix}{layer}.{linear}.weight"

    def linears(self, layer: int) -> dict[str, nn.Linear]:
        """A layer's linears, by what a checkpoint calls their weights."""
        modules = self.layers[layer].named_modules()
        return {self.name(layer, name): module for name, module in modules if isinstance(module, nn.Linear)}

    def experts(self, layer: int) -> dict[str, GatedExperts]:
        """A layer's mixtures of experts, by what a checkpoint calls them."""
        modules = self.layers[layer].named_modules()
        return {f"{self._prefix}{layer}.{name}": module for name, module in modules if isinstance(module, GatedExperts)}

    def expert_linears(self, layer: int) -> dict[str, ExpertLinears]:
        """Each projection of all experts of a layer, by what a checkpoint calls its weight."""
        modules = self.layers[layer].named_modules()
        return {self.name(layer, name): module for name, module in modules if isinstance(module, ExpertLinears)}

    def in_turn(self, doing: str, *, shows_progress: bool) -> Iterator[int]:
        """The number of each layer, which is in memory meanwhile; a bar says how far it is."""
        bar = ProgressBar(doing, len(self.layers), " layers", stays=True) if shows_progress else None
        self.begin()
        for number in range(len(self.layers)):
            heartbeat.beat(doing)
            with self.in_memory(number):
                yield number
            if bar:
                bar.advance(1)
        if bar:
            bar.close()

    def begin(self) -> None:
        """Bring what is not of the layers into memory, but for the head, and embed the rows."""
        head = part_names(self._model).head
        others = [m for name, m in self._model.named_modules() if not f"{name}.".startswith((self._prefix, f"{head}."))]
        for module in self._model.modules():
            _allocate_buffers(module, self._device)
        for module in others:
            _allocate(module, self._device)
        self._fill(lambda name: not name.startswith((self._prefix, f"{head}.")))
        self._model.fill_buffers()
        with self._stopping_at(0):
            self._hidden = [on_host(self._arguments(ids)[0][0]) for ids in self._ids]

    @contextmanager
    def in_memory(self, layer: int) -> Iterator[nn.Module]:
        """One of the layers with its weights, for as long as the context lasts."""
        module = self.layers[layer]
        for part in module.modules():
            _allocate(part, self._device)
        self._fill(lambda name: name.startswith(f"{self._prefix}{layer}."))
        for part in module.modules():
            if self._quant_format is not None and isinstance(part, ExpertLinears):
                part.round_(self._quant_format)
        try:
            yield module
        finally:
            for part in module.modules():
                _allocate(part, torch.device("meta"))

    @torch.no_grad()
    def run(self, layer: int, *, keep: bool) -> None:
        """Every row through ``layer``, which is in memory; its outputs are the next one's inputs if they are kept."""
        forward = self.layers[layer].forward
        with self._stopping_at(layer):
            for number, ids in enumerate(self._ids):
                (_, *others), named = self._arguments(ids)
                out = forward(self._hidden[number].to(self._device, non_blocking=True), *others, **named)
                if keep:
                    self._hidden[number] = on_host(out if isinstance(out, Tensor) else out[0])

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """Those [R, S, V] of the rows, a few at once, when each layer has run and what it put out was kept."""
        head = part_names(self._model).head
        for module in self._model.get_submodule(head).modules():
            _allocate(module, self._device)
        self._model.tie_weights()
        self._fill(lambda name: name.startswith(f"{head}."))
        for hidden, ids in zip(self._hidden, self._ids, strict=True):
            with self._ending_in(hidden.to(self._device)):
                yield self._model(ids.to(self._device))

    def _fill(self, chosen: Callable[[str], bool]) -> None:
        fills = plain_fills(self._model, self._source, chosen) + expert_fills_of(self._model, self._source, chosen)
        fill_shards.run(fills, self._source, self._device)

    @contextmanager
    def _stopping_at(self, layer: int) -> Iterator[None]:
        """Have the model's forward pass by the layers before ``layer``, and stop there."""
        for number, module in enumerate(self.layers):
            module.__dict__["forward"] = _stop if number == layer else _pass_by
        try:
            yield
        finally:
            for module in self.layers:
                del module.__dict__["forward"]

    @contextmanager
    def _ending_in(self, hidden_RSD: Tensor) -> Iterator[None]:
        """Have the model's forward pass by all layers, and the last one put out ``hidden_RSD``."""
        for module in self.layers:
            module.__dict__["forward"] = _pass_by
        self.layers[-1].__dict__["forward"] = lambda *_, **__: hidden_RSD
        try:
            yield
        finally:
            for module in self.layers:
                del module.__dict__["forward"]

    @torch.no_grad()
    def _arguments(self, ids_RS: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model's forward gives to the layer that it is stopped at."""
        try:
            self._model(ids_RS.to(self._device))
        except _Stopped as stopped:
            return stopped.arguments, stopped.named
        except (TypeError, ValueError, IndexError, AttributeError) as error:  # it takes something else from a layer
            kind = getattr(self._model.config, "model_type", "this model")
            raise ValueError(
                f"{kind}: its code does not pass hidden states from layer to layer, so they cannot be run one at "
                f"a time; to quantize, use --method nearest ({error})"
            ) from error
        raise AssertionError("the forward calls no layer")


def on_host(tensor: Tensor) -> Tensor:
    """It or, where it is on a GPU, a pinned copy."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class _Stopped(Exception):
    def __init__(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.arguments, self.named = arguments, named


def _stop(*arguments: Any, **named: Any) -> Tensor:
    raise _Stopped(arguments, named)


def _pass_by(hidden_RSD: Tensor, *others: Any, **named: Any) -> Tensor:
    return hidden_RSD


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Memory there for what checkpoints hold of ``module`` itself, its values unset."""
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(buffer, device=device)


def _allocate_buffers(module: nn.Module, device: torch.device) -> None:
    """The same for what they do not hold, which is small and stays."""
    for name, buffer in module.named_buffers(recurse=False):
        if name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(buffer, device=device)
