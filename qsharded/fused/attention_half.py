"""The first half of a decoder layer, and its gradients: norm, attention, residual addition, the norm before the MLP.

What follows it is in the same autograd node (:mod:`qsharded.fused.layer`), or behind it where that is a mixture of
experts (:mod:`qsharded.fused.mixture_layer`). What is not kept for the backward is computed again there, each by the
function that made it.

Axes: B rows, S tokens of a row, M = B S, D hidden size, H query heads, G key-value heads, E head dim, R ranks of a
group of adapters together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from qsharded.fused.norm_rotary_swiglu import Rotary, rms_norm, rms_norm_backward
from qsharded.fused.projections import Group, Projection
from qsharded.models.attention import Attention, Saved, choose_attention
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.decoder import DecoderLayer
from qsharded.models.norm import OffsetRMSNorm

_T = TypeVar("_T")


@dataclass(frozen=True)
class AttentionWeights:
    """The half's weights as the layer holds them in this forward, and how its attention runs.

    Attributes:
        norm_1, norm_2: what norms before attention and before the MLP multiply by; None: there is none.
        after_1: the same behind attention, times the residual multiplier.
        multiplier: of what is added to the residual stream where no norm has it.
        inputs: of the attention, with what of them is the layer's own.
    """

    qkv: Group
    o: Group
    norm_1: Tensor | None
    norm_2: Tensor | None
    after_1: Tensor | None
    multiplier: float
    eps: float
    rotary: Rotary
    attention: Attention
    inputs: AttentionInputs

    @classmethod
    def of(cls, layer: DecoderLayer, like: Tensor, shape: torch.Size, inputs: AttentionInputs) -> "AttentionWeights":
        """On the device and in the dtype of ``like``, [B, S, ...]."""
        a, config = layer.self_attn, layer.config
        inputs = a.inputs_of(inputs)
        return cls(
            qkv=Group([Projection.of(p) for p in a.input_projections()]),
            o=Group([Projection.of(a.o_proj)]),
            norm_1=norm_factor(layer, config.norms.before_attention),
            norm_2=norm_factor(layer, config.norms.before_mlp),
            after_1=norm_factor(layer, config.norms.after_attention, config.residual_multiplier),
            multiplier=config.residual_multiplier,
            eps=config.rms_norm_eps,
            rotary=rotary_of(layer, shape, inputs),
            attention=choose_attention(like, inputs, a.head_dim),
            inputs=inputs,
        )

    def trained(self) -> Iterator[Tensor | None]:
        """A and B of each projection in turn."""
        return (tensor for group in (self.qkv, self.o) for tensor in group.trained())


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
class AttentionResults:
    """What a forward makes; what is None is made when it is asked for, in the forward and again in the backward.

    Attributes:
        x_MD: the layer's input.
        qkv: [M, (H + 2G) E]: turned, or as it was before the norms of q and k where a model has them.
        attention: its output [M, H E], and what its backward needs.
        attended: o's output and the rstd of the norm behind it, if there is one.
        h_MD: the residual stream after attention.
        rstd_M: of the norm before the MLP, once that has been made.
        normed: the attention's normalised input and its rstd; not kept, as it takes as long to read as to make.
        narrow: each group's input times its adapters' A; it is small, and so always kept.
    """

    ATTRIBUTES: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv": ("qkv",),
        "attention": ("attention",),
        "h": ("h_MD", "attended"),
    }
    """What is kept under each name of a policy."""

    x_MD: Tensor | None = None
    qkv: Tensor | None = None
    attention: tuple[Tensor, Saved] | None = None
    attended: tuple[Tensor, Tensor] | None = None
    h_MD: Tensor | None = None
    rstd_M: Tensor | None = None
    normed: tuple[Tensor, Tensor | None] | None = None
    narrow: dict[str, Tensor | None] = field(default_factory=dict)

    def keep(self, names: frozenset[str]) -> Self:
        """Those that are named."""
        kept = {attribute: getattr(self, attribute) for name in names for attribute in self.ATTRIBUTES[name]}
        return type(self)(**kept, narrow=self.narrow)


class AttentionHalf:
    """A layer's weights at work on one input of ``shape`` [B, S, D]."""

    def __init__(self, weights: AttentionWeights, shape: torch.Size) -> None:
        self.weights, self.rows = weights, shape[:2]

    def mlp_input(self, results: AttentionResults, room_MD: Tensor) -> Tensor:
        """The normalised residual stream after attention, in ``room``; the results get the stream and the rstd."""
        norm, x_MD = self.weights.norm_2, there(results.x_MD)
        if results.h_MD is not None:
            x2_MD, results.rstd_M = self._normed(results.h_MD, norm, room_MD)
            return x2_MD
        added, results.attended = self.behind(
            self.weights.after_1, product("o", self.weights.o, self._attended(results), results)
        )
        if norm is None:
            results.h_MD = added.add_(x_MD)
            return room_MD.copy_(results.h_MD)
        x2_MD, results.rstd_M, results.h_MD = rms_norm(x_MD, norm, self.weights.eps, added, out=room_MD)
        return x2_MD

    def gradient_of_stream(self, results: AttentionResults, grad_x2_MD: Tensor, grad_h_MD: Tensor) -> Tensor:
        """By the residual stream after attention, of those by the MLP's input and by the stream that goes around it."""
        norm, rstd_M, results.rstd_M = self.weights.norm_2, results.rstd_M, None
        return self._norm_gradient(grad_x2_MD, there(results.h_MD), norm, rstd_M, grad_h_MD)

    def attention_gradients(
        self, results: AttentionResults, grad_h_MD: Tensor, wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(by the layer's input, by the adapters)."""
        q_k_v = self._q_k_v(results)
        out_MD = self._attended(results)
        assert results.attention is not None
        grad_o_MD = self.behind_gradient(self.weights.after_1, results.attended, grad_h_MD)
        of_o = self.weights.o.backward(grad_o_MD, out_MD, results.narrow["o"])
        results.attended = None
        del grad_o_MD
        by_head = (there(of_o.x).view(q_k_v[0].shape), *q_k_v, out_MD.view(q_k_v[0].shape))
        grads = self.weights.attention.backward(*by_head, results.attention[1], self.weights.inputs)
        grad_qkv = self.weights.rotary.backward(grads, there(results.qkv))
        x1_MD, rstd_M = self._attention_input(results)
        of_qkv = self.weights.qkv.backward(grad_qkv, x1_MD, results.narrow["qkv"], wants_x=wants_x)
        trained = of_qkv.adapters + of_o.adapters
        if of_qkv.x is None:
            return None, trained
        x_MD, norm = there(results.x_MD), self.weights.norm_1
        return self._norm_gradient(of_qkv.x, x_MD, norm, rstd_M, grad_h_MD), trained

    def behind(self, after: Tensor | None, y_MD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(what an output [M, D] adds to the residual stream, the output and its rstd if a norm follows it)."""
        if after is None:
            return y_MD if self.weights.multiplier == 1 else y_MD.mul_(self.weights.multiplier), None
        added_MD, rstd_M, _ = rms_norm(y_MD, after, self.weights.eps)
        return added_MD, (y_MD, rstd_M)

    def behind_gradient(self, after: Tensor | None, made: tuple[Tensor, Tensor] | None, grad_MD: Tensor) -> Tensor:
        """By the output, of the gradient by what it adds."""
        if after is None:
            return grad_MD if self.weights.multiplier == 1 else grad_MD * self.weights.multiplier
        y_MD, rstd_M = there(made)
        return rms_norm_backward(grad_MD, y_MD, after, rstd_M, None)

    def _normed(self, x_MD: Tensor, norm: Tensor | None, room_MD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x normalised in ``room``, rstd); as it is where there is no norm."""
        if norm is None:
            return room_MD.copy_(x_MD), None
        return rms_norm(x_MD, norm, self.weights.eps, out=room_MD)[:2]

    def _norm_gradient(
        self, grad_MD: Tensor, x_MD: Tensor, norm: Tensor | None, rstd_M: Tensor | None, around_MD: Tensor
    ) -> Tensor:
        """By the norm's input, which also goes around it."""
        if norm is None:
            return grad_MD + around_MD
        return rms_norm_backward(grad_MD, x_MD, norm, there(rstd_M), around_MD)

    def _attention_input(self, results: AttentionResults) -> tuple[Tensor, Tensor | None]:
        """(the normalised input, rstd)."""
        if results.normed is None:
            x_MD = there(results.x_MD)
            room_MD = self.weights.qkv.room(x_MD.shape[0], x_MD)
            results.normed = self._normed(x_MD, self.weights.norm_1, room_MD)
        return results.normed

    def _q_k_v(self, results: AttentionResults) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H, E], k and v [B, S, G, E], as attention takes them."""
        if results.qkv is None:
            x1_MD, _ = self._attention_input(results)
            results.qkv = product("qkv", self.weights.qkv, x1_MD, results)
            self.weights.rotary.turn_(results.qkv)
        q, k, v = self.weights.rotary.q_k_v(results.qkv)
        return tuple(tensor.unflatten(0, self.rows) for tensor in (q, k, v))  # type: ignore[return-value]

    def _attended(self, results: AttentionResults) -> Tensor:
        """Attention's output [M, H E]."""
        if results.attention is None:
            out, saved = self.weights.attention.forward(*self._q_k_v(results), self.weights.inputs)
            results.attention = out.flatten(2).flatten(0, 1), saved
        return results.attention[0]


def product(name: str, group: Group, x_MK: Tensor, results: AttentionResults) -> Tensor:
    """The group's outputs side by side; ``name``: its own among the results' narrow ones."""
    if name not in results.narrow:
        results.narrow[name] = group.narrow(x_MK)
    return group.forward(x_MK, results.narrow[name])


def there(value: _T | None) -> _T:
    """What must have been made by now."""
    assert value is not None
    return value
