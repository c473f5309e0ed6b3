"""What lies between a layer's products: norm, rotary embedding, SwiGLU; by kernels on a GPU, else in plain PyTorch.

Forward and backward are functions of their own, since the layer that calls them is one autograd node. The plain
versions compute in fp32 at least and round once, as the kernels do.

Axes: M tokens, D hidden size, J intermediate size, H query heads, G key-value heads, E head dim.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.models.rope import rotate
from qsharded.quant.backends import takes_triton


@cache
def _kernels(name: str) -> ModuleType:
    """The Triton module called ``name``; it is imported here since Triton loads slowly."""
    from qsharded_kernels import triton_rms_norm, triton_rotary, triton_swiglu

    return {"rms_norm": triton_rms_norm, "rotary": triton_rotary, "swiglu": triton_swiglu}[name]


def _served(name: str, x: Tensor) -> Any:
    if x.is_meta:
        return _SHAPES[name]
    return _kernels(name) if takes_triton(x) else None


class _NormShapes:
    """What the kernels allocate, without computing anything: for plans, which run a layer on the meta device."""

    @staticmethod
    def forward(
        x_MD: Tensor, weight_D: Tensor, eps: float, residual_MD: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, ...]:
        rstd_M = x_MD.new_empty(x_MD.shape[0], dtype=torch.float32)
        y_MD = torch.empty_like(x_MD) if out is None else out
        return y_MD, rstd_M, x_MD if residual_MD is None else torch.empty_like(x_MD)

    @staticmethod
    def backward(grad_y_MD: Tensor, h_MD: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(h_MD)


class _SwiGLUShapes:
    @staticmethod
    def forward(gate_up: Tensor, out: Tensor, activation: str) -> Tensor:
        return out

    @staticmethod
    def backward_(grad_act: Tensor, gate_up: Tensor, activation: str) -> None:
        pass


class _RotaryShapes:
    @staticmethod
    def forward_(qkv: Tensor, *_: Any, **options: Any) -> Tensor:
        out: Tensor = qkv if len(_) < 7 else _[6]
        return out

    @staticmethod
    def backward(grads: tuple[Tensor, ...], *_: Any, **options: Any) -> Tensor:
        heads = sum(grad.shape[2] for grad in grads)
        return grads[0].new_empty(grads[0].shape[:2].numel(), heads * grads[0].shape[3])


_SHAPES = {"rms_norm": _NormShapes, "swiglu": _SwiGLUShapes, "rotary": _RotaryShapes}


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's, also with a weight that is wider than x."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def rms_norm(
    x_MD: Tensor, weight_D: Tensor, eps: float, residual_MD: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rstd [M], h): h = x + residual, where there is one, and y = h / rms(h) * weight, in ``out`` where given."""
    if kernels := _served("rms_norm", x_MD):
        return kernels.forward(x_MD, weight_D, eps, residual_MD, out)
    h_MD = x_MD if residual_MD is None else x_MD + residual_MD
    wide_MD = _precise(h_MD)
    rstd_M = (wide_MD.square().mean(-1) + eps).rsqrt()
    y_MD = (wide_MD * rstd_M[:, None] * weight_D).to(x_MD.dtype)
    return y_MD if out is None else out.copy_(y_MD), rstd_M, h_MD


def rms_norm_backward(
    grad_y_MD: Tensor, h_MD: Tensor, weight_D: Tensor, rstd_M: Tensor, grad_residual_MD: Tensor | None
) -> Tensor:
    """The gradient by h: through the norm, plus ``grad_residual``, which comes around it."""
    if kernels := _served("rms_norm", h_MD):
        return kernels.backward(grad_y_MD, h_MD, weight_D, rstd_M, grad_residual_MD)
    h, grad, rstd_M1 = _precise(h_MD), _precise(grad_y_MD) * weight_D, rstd_M[:, None]
    grad_h = rstd_M1 * (grad - h * rstd_M1.square() * (grad * h).mean(-1, keepdim=True))
    return (grad_h if grad_residual_MD is None else grad_h + grad_residual_MD).to(h_MD.dtype)


def swiglu(gate_up: Tensor, out: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up [M, J] of ``gate_up`` [M, 2J], in ``out``; ``activation``: "silu" or "gelu_tanh"."""
    if kernels := _served("swiglu", gate_up):
        return kernels.forward(gate_up, out, activation)
    gate, up = _precise(gate_up).chunk(2, dim=-1)
    return out.copy_(gate * _gate(gate, activation)[0].sigmoid() * up)


def swiglu_backward_(grad_act: Tensor, gate_up: Tensor, activation: str = "silu") -> None:
    """In place: ``gate_up`` becomes its gradient, ``grad_act`` becomes the activation."""
    if kernels := _served("swiglu", gate_up):
        kernels.backward_(grad_act, gate_up, activation)
        return
    (gate, up), grad = _precise(gate_up).chunk(2, dim=-1), _precise(grad_act)
    z, slope = _gate(gate, activation)
    sigmoid = z.sigmoid()
    activated = gate * sigmoid
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid) * slope)
    grad_gate_up = torch.cat((grad_gate, grad * activated), dim=-1)
    grad_act.copy_(activated * up)  # last, for what is read above may share its memory with it
    gate_up.copy_(grad_gate_up)


def _gate(gate: Tensor, activation: str) -> tuple[Tensor, Tensor | float]:
    """(z, dz/dg) of an activation g sigmoid(z(g)): z = g for silu; gelu's approximation by tanh is one too, for
    (1 + tanh(u)) / 2 = sigmoid(2u)."""
    if activation == "silu":
        return gate, 1.0
    root = 2 * (2 / math.pi) ** 0.5
    return root * gate * (1 + 0.044715 * gate.square()), root * (1 + 3 * 0.044715 * gate.square())


@dataclass(frozen=True)
class Rotary:
    """How q and k are turned: tables [M, R] of cosines and sines, and the norms of each head before, if any.

    Attributes:
        cos_MR, sin_MR: in the activations' dtype; both halves of R are alike.
        heads, kv_heads, head_dim: H, G and E; the first R of a head's E dims are turned.
        norms: weights [E] of q's and k's RMSNorm, or None.
        eps: of those norms.
        interleaved: neighbours are pairs, not halves of R.
    """

    cos_MR: Tensor
    sin_MR: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0
    interleaved: bool = False

    def turn_(self, qkv: Tensor) -> None:
        """Turn q and k within ``qkv`` [M, (H + 2G) E], unless they have norms: these need what was there before."""
        if self.norms is not None:
            return
        if kernels := _served("rotary", qkv):
            tables, options = (self.cos_MR, self.sin_MR), {"head_dim": self.head_dim, "interleaved": self.interleaved}
            kernels.forward_(qkv, *tables, self.heads, self.kv_heads, **options)
        else:
            q_k = self._plain(qkv)
            qkv[:, : q_k.shape[1]] = q_k

    def q_k_v(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, H, E], k and v [M, G, E], normalised and turned, of ``qkv`` as :meth:`turn_` has left it."""
        M, E, together = qkv.shape[0], self.head_dim, self.heads + self.kv_heads
        q_k = (qkv if self.norms is None else self._normed(qkv)).view(M, -1, E)
        return q_k[:, : self.heads], q_k[:, self.heads : together], qkv.view(M, -1, E)[:, together:]

    def _normed(self, qkv: Tensor) -> Tensor:
        kernels = _served("rotary", qkv)
        if kernels is None:
            return self._plain(qkv)
        out = qkv.new_empty(qkv.shape[0], (self.heads + self.kv_heads) * self.head_dim)
        tables, options = (self.cos_MR, self.sin_MR), {"head_dim": self.head_dim, "interleaved": self.interleaved}
        return kernels.forward_(qkv, *tables, self.heads, self.kv_heads, self.norms, self.eps, out, **options)

    def backward(self, grads: tuple[Tensor, ...], qkv: Tensor) -> Tensor:
        """The gradient by the product ``qkv`` [M, (H + 2G) E] of those by q [B, S, H, E], k and v [B, S, G, E]."""
        if kernels := _served("rotary", grads[0]):
            tables = self.cos_MR, self.sin_MR
            return kernels.backward(grads, *tables, qkv, self.norms, self.eps, interleaved=self.interleaved)
        grads = tuple(grad.flatten(0, 1) for grad in grads)
        if self.norms is None:
            grad_qk = self._turn(torch.cat(grads[:2], dim=1), -1.0)
            return torch.cat((grad_qk, grads[2]), dim=1).flatten(1)
        leaf = qkv.detach().requires_grad_()
        with torch.enable_grad():
            q_k = self._plain(leaf).view(qkv.shape[0], -1, self.head_dim)
        (grad_qkv,) = torch.autograd.grad(q_k, leaf, torch.cat(grads[:2], dim=1))
        grad_qkv.unflatten(1, (-1, self.head_dim))[:, self.heads + self.kv_heads :] = grads[2]
        return grad_qkv

    def _plain(self, qkv: Tensor) -> Tensor:
        """q and k, normalised and turned, [M, (H + G) E]."""
        x = qkv.view(qkv.shape[0], -1, self.head_dim)
        q, k = x[:, : self.heads], x[:, self.heads : self.heads + self.kv_heads]
        if self.norms is not None:
            q, k = (_rms_norm(t, w, self.eps) for t, w in zip((q, k), self.norms, strict=True))
        return self._turn(torch.cat((q, k), dim=1), 1.0).flatten(1)

    def _turn(self, x_MHE: Tensor, direction: float) -> Tensor:
        tables = self.cos_MR, self.sin_MR * direction
        return rotate(_precise(x_MHE), *tables, interleaved=self.interleaved).to(x_MHE.dtype)
