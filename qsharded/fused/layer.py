"""A decoder layer as one autograd node. Read :meth:`_Layer.output` and :meth:`_Layer.gradients` side by side.

A node of its own knows what PyTorch's checkpointing cannot: which of a layer's results its backward reads. What is not
kept is computed again there, each by the function that made it, and what nobody reads (the down-projection's output,
unless a norm follows it) is not. Gradients go to the layer's input and to its adapters; everything else is frozen.

Axes: B rows, S tokens of a row, M = B S, D hidden size, J intermediate size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsharded.fused.attention_half import (
    AttentionHalf,
    AttentionResults,
    AttentionWeights,
    norm_factor,
    product,
    there,
)
from qsharded.fused.mixture_layer import mixture_forward
from qsharded.fused.norm_rotary_swiglu import swiglu, swiglu_backward_
from qsharded.fused.policy import KEEP_EVERYTHING, Policy
from qsharded.fused.projections import Group, Projection, is_projection
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.config import ModelConfig
from qsharded.models.decoder import DecoderLayer
from qsharded.models.mixture import MixtureMLP


@cache  # it is asked in every forward of every layer
def beyond_fused(config: ModelConfig) -> str | None:
    """What of a family's mathematics :func:`fused_forward` does not compute, in words; None where it computes all.

    It knows Llama's layer, also with norms before or after attention and MLP or both, of weight or 1 + weight; with q
    and k normalised by head; with fused projections; with gelu; with a residual multiplier; with windows; with a
    rotary embedding of each layer's own or none, of a part of each head or of neighbours; with scores scaled otherwise
    or soft-capped; with attention sinks. Of a layer with a mixture of experts it is all but the mixture, which runs as
    it is written.
    """
    missing = {
        "gated delta-net layers": config.linear is not None,
        "latent attention": config.latent is not None,
        "a gate on attention's output": config.attention_gate,
        "an MLP without a gate": config.mlp == "ungated",
        "norms of q and k other than of each head before it is rotated": config.qk_norm_place != "head",
    }
    return next((what for what, is_there in missing.items() if is_there), None)


def can_fuse(layer: nn.Module) -> bool:
    """Whether :func:`fused_forward` computes what ``layer`` does."""
    if not isinstance(layer, DecoderLayer) or beyond_fused(layer.config):  # FSDP2 makes a subclass of it
        return False
    attention, mlp = layer.self_attn, layer.mlp
    projections = [*attention.input_projections(), attention.o_proj]
    if not isinstance(mlp, MixtureMLP):
        projections += [*mlp.input_projections(), mlp.down_proj]
    norms = (*map(layer.get_submodule, layer.config.norms.names()), attention.q_norm, attention.k_norm)
    parameters = [*attention.parameters(recurse=False), *(p for norm in norms for p in norm.parameters())]
    frozen = not any(parameter.requires_grad for parameter in parameters)
    return frozen and all(map(is_projection, projections))


def fused_forward(
    layer: DecoderLayer, x_BSD: Tensor, inputs: AttentionInputs, policy: Policy = KEEP_EVERYTHING
) -> Tensor:
    """What ``layer`` computes, [B, S, D]."""
    if isinstance(layer.mlp, MixtureMLP):
        return mixture_forward(layer, x_BSD, inputs, policy)
    bound = _Bound(layer, inputs, x_BSD.shape, policy)
    at_work = bound.layer(x_BSD)
    if not torch.is_grad_enabled():
        return at_work.output(_Results(x_BSD.reshape(-1, x_BSD.shape[-1]))).view(x_BSD.shape)
    out: Tensor = _FusedLayer.apply(x_BSD, bound, at_work, policy, *at_work.trained())
    return out


@dataclass(frozen=True)
class _Bound:
    """A layer and what it is called with."""

    module: DecoderLayer
    inputs: AttentionInputs
    shape: torch.Size
    policy: Policy

    def layer(self, like: Tensor) -> "_Layer":
        """At work with the weights that the module holds now, on the device and in the dtype of ``like``."""
        with self.policy.present(like.device):
            weights = AttentionWeights.of(self.module, like, self.shape, self.inputs)
            return _Layer(weights, _MLPWeights.of(self.module), self.shape)


@dataclass(frozen=True)
class _MLPWeights:
    """The MLP's weights as the layer holds them in this forward.

    Attributes:
        after_2: what a norm behind it multiplies by, times the residual multiplier; None: there is none.
    """

    gate_up: Group
    down: Group
    after_2: Tensor | None
    activation: str

    @classmethod
    def of(cls, layer: DecoderLayer) -> "_MLPWeights":
        mlp, config = layer.mlp, layer.config
        return cls(
            gate_up=Group([Projection.of(p) for p in mlp.input_projections()]),
            down=Group([Projection.of(mlp.down_proj)]),
            after_2=norm_factor(layer, config.norms.after_mlp, config.residual_multiplier),
            activation=config.activation,
        )


@dataclass
class _Results(AttentionResults):
    """A whole layer's.

    Attributes:
        gate_up: [M, 2J].
        mlp: the down-projection's output and the rstd of the norm behind it, if there is one.
    """

    ATTRIBUTES = AttentionResults.ATTRIBUTES | {"gate_up": ("gate_up", "mlp")}

    gate_up: Tensor | None = None
    mlp: tuple[Tensor, Tensor] | None = None


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSD: Tensor, bound: _Bound, layer: "_Layer", policy: Policy, *trained: Tensor | None
    ) -> Tensor:
        results = _Results(x_BSD.reshape(-1, x_BSD.shape[-1]))
        out_MD = layer.output(results)
        if any(ctx.needs_input_grad):
            ctx.bound, ctx.layer = bound, None if policy.weights_present else layer
            ctx.results, ctx.waiting = results.keep(policy.kept), policy.keep_input(x_BSD)
        # No view to autograd: FSDP2 hooks its gather for the backward to this, and in-place operations drop a view's.
        out_BSD: Tensor = torch.ops.aten._unsafe_view(out_MD, x_BSD.shape)
        return out_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        results, waiting = ctx.results, ctx.waiting
        layer = ctx.layer or ctx.bound.layer(grad_BSD)
        ctx.layer = ctx.results = ctx.waiting = None  # the results are used up
        results.x_MD = waiting.take().reshape(-1, grad_BSD.shape[-1])
        grad_x_MD, trained = layer.gradients(results, grad_BSD.reshape(results.x_MD.shape), ctx.needs_input_grad[0])
        return None if grad_x_MD is None else grad_x_MD.view(grad_BSD.shape), None, None, None, *trained


class _Layer(AttentionHalf):
    """A layer's weights at work on one input."""

    def __init__(self, weights: AttentionWeights, mlp: _MLPWeights, shape: torch.Size) -> None:
        super().__init__(weights, shape)
        self.mlp = mlp

    def trained(self) -> Iterator[Tensor | None]:
        """A and B of each projection in turn."""
        yield from self.weights.trained()
        yield from self.mlp.gate_up.trained()
        yield from self.mlp.down.trained()

    def output(self, results: _Results) -> Tensor:
        """The layer's output [M, D]."""
        x2_MD = self._input_of_gate_up(results)
        gate_up = self._gate_up(results, x2_MD)
        del x2_MD
        added_MD, results.mlp = self.behind(self.mlp.after_2, self._down(results, gate_up))
        return added_MD.add_(there(results.h_MD))

    def gradients(self, results: _Results, grad_MD: Tensor, wants_x: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """Those by the input (None unless it is wanted), and by A and B of all projections."""
        grad_h_MD, of_mlp = self._mlp_gradients(results, grad_MD)
        grad_x_MD, of_attention = self.attention_gradients(results, grad_h_MD, wants_x)
        return grad_x_MD, of_attention + of_mlp

    def _input_of_gate_up(self, results: _Results) -> Tensor:
        x_MD = there(results.x_MD)
        return self.mlp_input(results, self.mlp.gate_up.room(x_MD.shape[0], x_MD))

    def _down(self, results: _Results, gate_up: Tensor) -> Tensor:
        """The MLP's output [M, D] of gate and up."""
        act = swiglu(gate_up, self.mlp.down.room(gate_up.shape[0], gate_up), self.mlp.activation)
        return product("down", self.mlp.down, act, results)

    def _gate_up(self, results: _Results, x2_MD: Tensor) -> Tensor:
        if results.gate_up is None:
            results.gate_up = product("gate_up", self.mlp.gate_up, x2_MD, results)
        return results.gate_up

    def _mlp_gradients(self, results: _Results, grad_MD: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """(by the residual stream after attention, by the adapters). The gate and up matrix is used up."""
        down, gate_up, after_2 = self.mlp.down, self.mlp.gate_up, self.mlp.after_2
        x2_MD = self._input_of_gate_up(results)
        grad_gate_up = self._gate_up(results, x2_MD)
        if after_2 is not None and results.mlp is None:
            _, results.mlp = self.behind(after_2, self._down(results, grad_gate_up))
        grad_y_MD = self.behind_gradient(after_2, results.mlp, grad_MD)
        results.gate_up = results.mlp = None
        act, grad_narrow = down.input_gradients(grad_y_MD)
        swiglu_backward_(act, grad_gate_up, self.mlp.activation)
        of_down = down.adapter_gradients(grad_y_MD, act, results.narrow["down"], grad_narrow)
        del act, grad_y_MD
        of_gate_up = gate_up.backward(grad_gate_up, x2_MD, results.narrow["gate_up"])
        del grad_gate_up
        grad_h_MD = self.gradient_of_stream(results, there(of_gate_up.x), grad_MD)
        return grad_h_MD, of_gate_up.adapters + of_down
