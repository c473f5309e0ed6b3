"""A layer as it trains, and the same bytes in a plain copy of it that is neither sharded nor fused nor checkpointed.

Both get one input, and both backwards one gradient; :mod:`qsharded.training.self_check` holds them against each other.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from qsharded.distributed.fsdp import layers_of
from qsharded.distributed.layer_conditions import adapters_at_work, bytes_compared, evaluating, unsharded
from qsharded.distributed.world import World
from qsharded.lora.layer import LoRALinear
from qsharded.models import CausalLM
from qsharded.utils import collectives
from qsharded.utils.sharding import local, own_rows


@dataclass(frozen=True)
class Passes:
    """A forward and a backward.

    Attributes:
        output: of the layer, less its input: what the layer adds.
        gradient: by the input, less the output's own.
        trained: gradients by what trains, this rank's rows of the mean over all ranks.
        frozen: what else has a gradient, or asks for one.
        adapted: the adapted layers that got tokens on this rank; of a mixture's experts some may get none.
    """

    output: Tensor
    gradient: Tensor
    trained: dict[str, Tensor | None]
    frozen: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """What the model calls the layer with."""

    x: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]


class LayerTwin:
    """The first layer of ``model`` that trains, to be made before the model is sharded: its shapes, no memory.

    Attributes:
        index: the layer's; None where none trains.
    """

    def __init__(self, model: CausalLM) -> None:
        layers = list(layers_of(model))
        found = (at for at, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
        self.index = next(found, None)
        if self.index is not None:
            layer = layers[self.index]
            self._copy = copy.deepcopy(layer, _shared(layer)).eval()
            self._trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}

    def passes(self, model: CausalLM, world: World, tokens: int) -> tuple[Passes, Passes, list[str]]:
        """The layer's passes as it trains, and its twin's, on ``tokens`` tokens, other ones on each rank; and the
        packed layers of which other bytes were used than the ranks hold. Every rank calls this. The adapters are at
        work meanwhile, whatever they are; they, and what has no gradient, are left as they were.
        """
        assert self.index is not None
        layer = list(layers_of(model))[self.index]
        ids_BS = (torch.arange(tokens, device=world.device)[None] * 37 + 101 * world.rank) % model.config.vocab_size
        with torch.random.fork_rng([]), evaluating(layer), adapters_at_work(layer):
            held = chain(layer.named_parameters(), layer.named_buffers())
            whole = {name: unsharded(tensor, world.device) for name, tensor in held}
            with bytes_compared(layer, whole) as changed:
                call, trains = self._sharded(model, layer, ids_BS)
            return trains, self._unsharded(call, whole, layer, world), sorted(changed)

    def _sharded(self, model: CausalLM, layer: nn.Module, ids_BS: Tensor) -> tuple[_Call, Passes]:
        calls: list[_Call] = []
        asking: list[str] = []

        def one_layer(ids_BS: Tensor) -> Any:
            calls.append(_reached(forward, layer, ids_BS))
            made = layer(calls[0].x, *calls[0].others, **calls[0].named)
            return _first(made)

        def look(_: nn.Module, __: Any) -> None:
            asking.extend(name for name, p in layer.named_parameters() if p.requires_grad and name not in self._trains)

        forward = model.forward
        hook = layer.register_forward_pre_hook(look)  # behind FSDP2's, which has brought what is gathered
        model.forward = one_layer  # type: ignore[method-assign, assignment]  # under FSDP2's hooks
        try:
            y = model(ids_BS)
            y.backward(_pattern(y))
        finally:
            hook.remove()
            del model.forward
        trained, frozen = self._gradients(model, layer)
        return calls[0], _passes(calls[0].x, y, trained, frozen=[*frozen, *asking])

    def _gradients(self, model: CausalLM, layer: nn.Module) -> tuple[dict[str, Tensor | None], list[str]]:
        """Of what trains, and the names of what else has one; none is left."""
        own = dict(layer.named_parameters())
        trained = {name: None if (grad := own[name].grad) is None else local(grad) for name in sorted(self._trains)}
        frozen = [n for n, parameter in own.items() if n not in self._trains and parameter.grad is not None]
        model.zero_grad()
        return trained, frozen

    def _unsharded(self, call: _Call, whole: dict[str, Tensor], layer: nn.Module, world: World) -> Passes:
        trained = {name: whole[name].detach().clone().requires_grad_() for name in sorted(self._trains)}
        x = call.x.detach().requires_grad_()
        with _tokens_noted(self._copy) as adapted:
            y = _first(functional_call(self._copy, whole | trained, (x, *call.others), call.named))
        y.backward(_pattern(y))
        own = dict(layer.named_parameters())
        means = {name: _mean_rows(leaf, own[name], world) for name, leaf in trained.items()}
        return _passes(x, y, means, adapted=adapted)


def _shared(layer: nn.Module) -> dict[int, Any]:
    """For a deep copy, what the copy has in common with the layer: configurations, and where documents are told."""
    plain = (value for module in layer.modules() for key, value in vars(module).items() if not key.startswith("_"))
    return {id(value): value for value in plain}


def _reached(forward: Any, layer: nn.Module, ids_BS: Tensor) -> _Call:
    """What the model's forward calls the layer with. No hook of the layer's own has run by then."""

    class Reached(Exception):
        pass

    calls: list[_Call] = []

    def stop(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(_Call(given[0].detach().requires_grad_(), given[1:], named))
        raise Reached

    hook = layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with torch.no_grad():
            forward(ids_BS)
    except Reached:
        pass
    finally:
        hook.remove()
    return calls[0]


def _first(made: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    hidden_BSD: Tensor = made[0] if isinstance(made, tuple) else made
    return hidden_BSD


def _pattern(like: Tensor) -> Tensor:
    """A gradient for it, on all ranks alike."""
    numbers = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return numbers.mul_(0.7).cos_().view_as(like).to(like.dtype)


def _passes(x: Tensor, y: Tensor, trained: dict[str, Tensor | None], **names: list[str]) -> Passes:
    assert x.grad is not None
    return Passes((y - x).detach(), x.grad - _pattern(y), trained, **names)


@contextmanager
def _tokens_noted(layer: nn.Module) -> Iterator[list[str]]:
    """The names of the adapted layers that are called meanwhile with any tokens."""
    names: list[str] = []

    def note(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        names.extend([name] if given[0].numel() else [])

    adapted = ((name, module) for name, module in layer.named_modules() if isinstance(module, LoRALinear))
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in adapted]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _mean_rows(leaf: Tensor, parameter: Tensor, world: World) -> Tensor | None:
    """This rank's rows of the mean over ranks of a leaf's gradient; a rank that has none adds zero."""
    gradient = torch.zeros_like(leaf, dtype=torch.float32) if leaf.grad is None else leaf.grad.float()
    collectives.all_reduce(gradient, dist.ReduceOp.SUM, world.group)
    rows = own_rows(parameter)
    return gradient[rows.start : rows.stop] / world.size
