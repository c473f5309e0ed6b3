"""A decoder layer as one autograd node. Read :meth:`_Layer.output` and :meth:`_Layer.gradients` side by side.

A node of its own knows what PyTorch's checkpointing cannot: which of a layer's results its backward reads. What is not
kept is computed again there, each by the function that made it, and what nobody reads (the down-projection's output,
unless a norm follows it) is not. Gradients go to the layer's input and to its adapters; everything else is frozen.

Axes: B rows, S tokens of a row, M = B S, D hidden size, J intermediate size, H query heads, G key-value heads, E head
dim, R ranks of a group of adapters together.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsharded.fused.norm_rotary_swiglu import Rotary, rms_norm, rms_norm_backward, swiglu, swiglu_backward_
from qsharded.fused.projections import Group, Projection, is_projection
from qsharded.models.attention import Attention, Saved, choose_attention
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.config import ModelConfig
from qsharded.models.decoder import DecoderLayer
from qsharded.models.norm import OffsetRMSNorm

_T = TypeVar("_T")

EVERYTHING = frozenset({"qkv", "attention", "h", "gate_up"})
"""What a layer can keep for its backward beside its input, in the order in which it is computed."""


class LayerInput:
    """How a layer's input waits for the backward: here as it is."""

    def __init__(self, x_BSD: Tensor) -> None:
        self._x_BSD = x_BSD

    def take(self) -> Tensor:
        """The input again."""
        return self._x_BSD


@dataclass(frozen=True)
class Policy:
    """What waits for a layer's backward.

    Attributes:
        kept: of ``EVERYTHING``; the rest is computed again.
        keep_input: called with the layer's input; its result's ``take()`` gives the input back, once.
        weights_present: for weights that are elsewhere between calls: a context on a device in which the layer's
            modules hold them. They are then asked for again in the backward, and not kept.
    """

    kept: frozenset[str] = EVERYTHING
    keep_input: Callable[[Tensor], Any] = LayerInput
    weights_present: Callable[[torch.device], AbstractContextManager[None]] | None = None


@cache  # it is asked in every forward of every layer
def beyond_fused(config: ModelConfig) -> str | None:
    """What of a family's mathematics :func:`fused_forward` does not compute, in words; None where it computes all.

    It knows Llama's layer, also with norms before or after attention and MLP or both, of weight or 1 + weight; with q
    and k normalised by head; with fused projections; with gelu; with a residual multiplier; with windows; with a
    rotary embedding of each layer's own or none, of a part of each head or of neighbours; with scores scaled otherwise
    or soft-capped.
    """
    missing = {
        "gated delta-net layers": config.linear is not None,
        "latent attention": config.latent is not None,
        "a mixture of experts": config.mixture is not None,
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
    projections = (*attention.input_projections(), attention.o_proj, *mlp.input_projections(), mlp.down_proj)
    norms = (*map(layer.get_submodule, layer.config.norms.names()), attention.q_norm, attention.k_norm)
    frozen = not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    return frozen and all(map(is_projection, projections))


def fused_forward(layer: DecoderLayer, x_BSD: Tensor, inputs: AttentionInputs, policy: Policy = Policy()) -> Tensor:
    """What ``layer`` computes, [B, S, D]."""
    bound = _Bound(layer, inputs, x_BSD.shape, policy.weights_present)
    at_work = bound.layer(x_BSD)
    if not torch.is_grad_enabled():
        return at_work.output(_Results(x_BSD.reshape(-1, x_BSD.shape[-1]))).view(x_BSD.shape)
    out: Tensor = _FusedLayer.apply(x_BSD, bound, at_work, policy, *at_work.weights.trained())
    return out


@dataclass(frozen=True)
class _Bound:
    """A layer and what it is called with."""

    module: DecoderLayer
    inputs: AttentionInputs
    shape: torch.Size
    weights_present: Callable[[torch.device], AbstractContextManager[None]] | None

    def layer(self, like: Tensor) -> "_Layer":
        """At work with the weights that the module holds now, on the device and in the dtype of ``like``."""
        with self.weights_present(like.device) if self.weights_present else nullcontext():
            return _Layer(_Weights.of(self.module, like, self.shape, self.inputs), self.inputs, self.shape)


@dataclass(frozen=True)
class _Weights:
    """The layer's weights as it holds them in this forward, and how its attention runs.

    Attributes:
        norm_1, norm_2: what norms before attention and before the MLP multiply by; None: there is none.
        after_1, after_2: the same behind them, times the residual multiplier.
        multiplier: of what is added to the residual stream where no norm has it.
    """

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norm_1: Tensor | None
    norm_2: Tensor | None
    after_1: Tensor | None
    after_2: Tensor | None
    multiplier: float
    eps: float
    rotary: Rotary
    activation: str
    attention: Attention

    @classmethod
    def of(cls, layer: DecoderLayer, like: Tensor, shape: torch.Size, inputs: AttentionInputs) -> "_Weights":
        a, mlp, config = layer.self_attn, layer.mlp, layer.config
        places = config.norms.before_attention, config.norms.before_mlp
        behind = config.norms.after_attention, config.norms.after_mlp
        norm_1, norm_2 = (norm_factor(layer, name) for name in places)
        after_1, after_2 = (norm_factor(layer, name, config.residual_multiplier) for name in behind)
        return cls(
            qkv=Group([Projection.of(p) for p in a.input_projections()]),
            o=Group([Projection.of(a.o_proj)]),
            gate_up=Group([Projection.of(p) for p in mlp.input_projections()]),
            down=Group([Projection.of(mlp.down_proj)]),
            norm_1=norm_1,
            norm_2=norm_2,
            after_1=after_1,
            after_2=after_2,
            multiplier=config.residual_multiplier,
            eps=config.rms_norm_eps,
            rotary=rotary_of(layer, shape, inputs),
            activation=config.activation,
            attention=choose_attention(like, inputs, a.head_dim),
        )

    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def trained(self) -> Iterator[Tensor | None]:
        return (tensor for group in self.groups() for tensor in group.trained())


def norm_factor(layer: DecoderLayer, name: str | None, multiplier: float = 1.0) -> Tensor | None:
    """What the layer's norm of this name multiplies by, [D]."""
    return None if name is None else factor_of(layer.get_submodule(name), multiplier)


def factor_of(norm: nn.Module, multiplier: float = 1.0) -> Tensor:
    weight: Tensor = norm.get_parameter("weight")
    if isinstance(norm, OffsetRMSNorm):
        weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight if multiplier == 1 else weight * multiplier


def rotary_of(layer: DecoderLayer, shape: torch.Size, inputs: AttentionInputs) -> Rotary:
    a = layer.self_attn
    cos_MR, sin_MR = (table.expand(*shape[:2], -1).flatten(0, 1) for table in (inputs.cos_BSR, inputs.sin_BSR))
    norms = None
    if isinstance(a.q_norm, nn.RMSNorm) and isinstance(a.k_norm, nn.RMSNorm):
        norms = factor_of(a.q_norm), factor_of(a.k_norm)
    eps = layer.config.rms_norm_eps
    return Rotary(cos_MR, sin_MR, a.heads, a.kv_heads, a.head_dim, norms, eps, a.interleaved)


@dataclass
class _Results:
    """What a forward makes; what is None is made when it is asked for, in the forward and again in the backward.

    Attributes:
        x_MD: the layer's input.
        qkv: [M, (H + 2G) E]: turned, or as it was before the norms of q and k where a model has them.
        attention: its output [M, H E], and what its backward needs.
        attended: o's output and the rstd of the norm behind it, if there is one.
        h_MD: the residual stream after attention.
        gate_up: [M, 2J].
        mlp: the down-projection's output and the rstd of the norm behind it, if there is one.
        normed: the attention's normalised input and its rstd; not kept, as it takes as long to read as to make.
        narrow: each group's input times its adapters' A; it is small, and so always kept.
    """

    x_MD: Tensor | None = None
    qkv: Tensor | None = None
    attention: tuple[Tensor, Saved] | None = None
    attended: tuple[Tensor, Tensor] | None = None
    h_MD: Tensor | None = None
    gate_up: Tensor | None = None
    mlp: tuple[Tensor, Tensor] | None = None
    normed: tuple[Tensor, Tensor | None] | None = None
    narrow: dict[str, Tensor | None] = field(default_factory=dict)

    def keep(self, names: frozenset[str]) -> "_Results":
        """Those of ``EVERYTHING`` that are named."""
        kept = {attribute: getattr(self, attribute) for name in names for attribute in _ATTRIBUTES[name]}
        return _Results(**kept, narrow=self.narrow)


_ATTRIBUTES = {
    "qkv": ("qkv",),
    "attention": ("attention",),
    "h": ("h_MD", "attended"),
    "gate_up": ("gate_up", "mlp"),
}


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


class _Layer:
    """A layer's weights at work on one input."""

    def __init__(self, weights: _Weights, inputs: AttentionInputs, shape: torch.Size) -> None:
        self.weights, self.inputs, self.rows = weights, inputs, shape[:2]

    def output(self, results: _Results) -> Tensor:
        """The layer's output [M, D]."""
        x2_MD, _ = self._mlp_input(results)
        gate_up = self._gate_up(results, x2_MD)
        del x2_MD
        added_MD, results.mlp = self._behind(self.weights.after_2, self._down(results, gate_up))
        return added_MD.add_(_there(results.h_MD))

    def gradients(self, results: _Results, grad_MD: Tensor, wants_x: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """Those by the input (None unless it is wanted), and by A and B of all projections."""
        grad_h_MD, of_mlp = self._mlp_gradients(results, grad_MD)
        grad_x_MD, of_attention = self._attention_gradients(results, grad_h_MD, wants_x)
        return grad_x_MD, of_attention + of_mlp

    def _product(self, group: str, x: Tensor, results: _Results) -> Tensor:
        projections: Group = getattr(self.weights, group)
        if group not in results.narrow:
            results.narrow[group] = projections.narrow(x)
        return projections.forward(x, results.narrow[group])

    def _normed(self, x_MD: Tensor, norm: Tensor | None, group: Group) -> tuple[Tensor, Tensor | None]:
        """(the normalised input of ``group``, rstd); as it is where there is no norm."""
        room = group.room(x_MD.shape[0], x_MD)
        if norm is None:
            return room.copy_(x_MD), None
        return rms_norm(x_MD, norm, self.weights.eps, out=room)[:2]

    def _norm_gradient(
        self, grad_MD: Tensor, x_MD: Tensor, norm: Tensor | None, rstd_M: Tensor | None, around_MD: Tensor
    ) -> Tensor:
        """By the norm's input, which also goes around it."""
        if norm is None:
            return grad_MD + around_MD
        return rms_norm_backward(grad_MD, x_MD, norm, _there(rstd_M), around_MD)

    def _behind(self, after: Tensor | None, y_MD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(what an output [M, D] adds to the residual stream, the output and its rstd if a norm follows it)."""
        if after is None:
            return y_MD if self.weights.multiplier == 1 else y_MD.mul_(self.weights.multiplier), None
        added_MD, rstd_M, _ = rms_norm(y_MD, after, self.weights.eps)
        return added_MD, (y_MD, rstd_M)

    def _behind_gradient(self, after: Tensor | None, made: tuple[Tensor, Tensor] | None, grad_MD: Tensor) -> Tensor:
        """By the output, of the gradient by what it adds."""
        if after is None:
            return grad_MD if self.weights.multiplier == 1 else grad_MD * self.weights.multiplier
        y_MD, rstd_M = _there(made)
        return rms_norm_backward(grad_MD, y_MD, after, rstd_M, None)

    def _attention_input(self, results: _Results) -> tuple[Tensor, Tensor | None]:
        """(the normalised input, rstd)."""
        if results.normed is None:
            results.normed = self._normed(_there(results.x_MD), self.weights.norm_1, self.weights.qkv)
        return results.normed

    def _q_k_v(self, results: _Results) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H, E], k and v [B, S, G, E], as attention takes them."""
        if results.qkv is None:
            x1_MD, _ = self._attention_input(results)
            results.qkv = self._product("qkv", x1_MD, results)
            self.weights.rotary.turn_(results.qkv)
        q, k, v = self.weights.rotary.q_k_v(results.qkv)
        return tuple(tensor.unflatten(0, self.rows) for tensor in (q, k, v))  # type: ignore[return-value]

    def _attended(self, results: _Results) -> Tensor:
        """Attention's output [M, H E]."""
        if results.attention is None:
            out, saved = self.weights.attention.forward(*self._q_k_v(results), self.inputs)
            results.attention = out.flatten(2).flatten(0, 1), saved
        return results.attention[0]

    def _mlp_input(self, results: _Results) -> tuple[Tensor, Tensor | None]:
        """(the normalised residual stream after attention, rstd)."""
        norm, x_MD = self.weights.norm_2, _there(results.x_MD)
        if results.h_MD is not None:
            return self._normed(results.h_MD, norm, self.weights.gate_up)
        added, results.attended = self._behind(
            self.weights.after_1, self._product("o", self._attended(results), results)
        )
        if norm is None:
            results.h_MD = added.add_(x_MD)
            return self._normed(results.h_MD, None, self.weights.gate_up)
        room = self.weights.gate_up.room(x_MD.shape[0], x_MD)
        x2_MD, rstd_M, results.h_MD = rms_norm(x_MD, norm, self.weights.eps, added, out=room)
        return x2_MD, rstd_M

    def _down(self, results: _Results, gate_up: Tensor) -> Tensor:
        """The MLP's output [M, D] of gate and up."""
        act = swiglu(gate_up, self.weights.down.room(gate_up.shape[0], gate_up), self.weights.activation)
        return self._product("down", act, results)

    def _gate_up(self, results: _Results, x2_MD: Tensor) -> Tensor:
        if results.gate_up is None:
            results.gate_up = self._product("gate_up", x2_MD, results)
        return results.gate_up

    def _mlp_gradients(self, results: _Results, grad_MD: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """(by the residual stream after attention, by the adapters). The gate and up matrix is used up."""
        down, gate_up = self.weights.down, self.weights.gate_up
        x2_MD, rstd_M = self._mlp_input(results)
        grad_gate_up = self._gate_up(results, x2_MD)
        if self.weights.after_2 is not None and results.mlp is None:
            _, results.mlp = self._behind(self.weights.after_2, self._down(results, grad_gate_up))
        grad_y_MD = self._behind_gradient(self.weights.after_2, results.mlp, grad_MD)
        results.gate_up = results.mlp = None
        act, grad_narrow = down.input_gradients(grad_y_MD)
        swiglu_backward_(act, grad_gate_up, self.weights.activation)
        of_down = down.adapter_gradients(grad_y_MD, act, results.narrow["down"], grad_narrow)
        del act, grad_y_MD
        of_gate_up = gate_up.backward(grad_gate_up, x2_MD, results.narrow["gate_up"])
        del grad_gate_up
        h_MD, norm = _there(results.h_MD), self.weights.norm_2
        grad_h_MD = self._norm_gradient(_there(of_gate_up.x), h_MD, norm, rstd_M, grad_MD)
        return grad_h_MD, of_gate_up.adapters + of_down

    def _attention_gradients(
        self, results: _Results, grad_h_MD: Tensor, wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(by the layer's input, by the adapters)."""
        q_k_v = self._q_k_v(results)
        out_MD = self._attended(results)
        assert results.attention is not None
        grad_o_MD = self._behind_gradient(self.weights.after_1, results.attended, grad_h_MD)
        of_o = self.weights.o.backward(grad_o_MD, out_MD, results.narrow["o"])
        results.attended = None
        del grad_o_MD
        by_head = (_there(of_o.x).view(q_k_v[0].shape), *q_k_v, out_MD.view(q_k_v[0].shape))
        grads = self.weights.attention.backward(*by_head, results.attention[1], self.inputs)
        grad_qkv = self.weights.rotary.backward(grads, _there(results.qkv))
        x1_MD, rstd_M = self._attention_input(results)
        of_qkv = self.weights.qkv.backward(grad_qkv, x1_MD, results.narrow["qkv"], wants_x=wants_x)
        trained = of_qkv.adapters + of_o.adapters
        if of_qkv.x is None:
            return None, trained
        x_MD, norm = _there(results.x_MD), self.weights.norm_1
        return self._norm_gradient(of_qkv.x, x_MD, norm, rstd_M, grad_h_MD), trained


def _there(value: _T | None) -> _T:
    assert value is not None
    return value
