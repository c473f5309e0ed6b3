"""Products of one input with several frozen weights and their adapters, forward and backward, without autograd.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T
    dx = sum_i dy_i W_i + s_i (dy_i B_i) A_i,  dA_i = s_i (dy_i B_i)^T x,  dB_i = s_i dy_i^T (x A_i^T)

Axes: M tokens, K in_features, N out_features of the whole group, n of one projection, R ranks of the group together
(rounded up to whole 16 bytes), r of one.
Source: Hu et al., "LoRA", arXiv:2106.09685.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.lora.layer import LoRALinear
from qsharded.quant import backends
from qsharded.quant.linear import PackedLinear
from qsharded.quant.packed_weight import PackedWeight

_T = TypeVar("_T")
_ALIGNMENT = 8  # ranks: products read 16 bytes at a time
_PITCH = 64  # of rows with room behind them: each begins a cache line of 128 bytes in 16 bits


@dataclass(frozen=True)
class Projection:
    """One linear layer as it is during a forward: sharding and offload put other tensors into it between calls.

    Attributes:
        in_features, out_features: K and n.
        packed: the frozen weight in 4 bits, or None.
        plain: the frozen weight [n, K] that is not packed, or None.
        bias: [n] or None.
        A, B: the adapter's weights [r, K] and [n, r], or None.
        scaling: of the adapter.
    """

    in_features: int
    out_features: int
    packed: PackedWeight | None
    plain: Tensor | None
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 0.0

    @classmethod
    def of(cls, layer: nn.Module) -> "Projection":
        """Of a layer that :func:`is_projection` accepts."""
        base: Any = layer.base_layer if isinstance(layer, LoRALinear) else layer
        packed, plain = (base.packed(), None) if isinstance(base, PackedLinear) else (None, base.weight)
        frozen = base.in_features, base.out_features, packed, plain, base.bias
        adapter: tuple[Any, ...] = ()
        if isinstance(layer, LoRALinear) and layer.enabled:
            adapter = layer.lora_A.weight, layer.lora_B.weight, layer.scaling
        return cls(*frozen, *adapter)

    @property
    def rank(self) -> int:
        """r, or 0 without an adapter."""
        return 0 if self.A is None else self.A.shape[0]

    def put_weight(self, out: Tensor) -> None:
        """The weight into ``out`` [n, K], whose rows are in a run."""
        if self.packed is None:
            out.copy_(_there(self.plain))
        else:
            backends.dequantize(self.packed, out.dtype, out=out)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return _there(self.plain).device if self.packed is None else self.packed.device


def is_projection(layer: nn.Module) -> bool:
    """Whether a group can hold ``layer``: frozen, with an adapter of ours or none, and no dropout at work."""
    if layer._forward_hooks or layer._forward_pre_hooks:  # somebody wants to see it called
        return False
    if isinstance(layer, LoRALinear):
        if type(layer).adapt is not LoRALinear.adapt:  # a subclass computes something else
            return False
        return (layer.dropout == 0 or not layer.training) and _is_frozen_base(layer.base_layer)
    return _is_frozen_base(layer)


def _is_frozen_base(base: nn.Module) -> bool:
    # a subclass may compute something else
    known = type(base) in (PackedLinear, nn.Linear)
    return known and not any(parameter.requires_grad for parameter in base.parameters())


@dataclass(frozen=True)
class Gradients:
    """By a group's input [M, K] (None where nobody asks), and by A and B of each of its projections in turn."""

    x: Tensor | None
    adapters: list[Tensor | None]


class Group:
    """Projections that share their input, with the adapters' products inside the base's:

        y = (x | x A^T) (W | s B)^T

    where A stacks the A_i and B has the B_i on its diagonal, so that no adapter's output is ever written by itself. The
    input has room for x A^T behind each of its rows where :meth:`room` made it; else it takes a product of its own.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = projections
        self._K = projections[0].in_features
        self._widths = [projection.out_features for projection in projections]
        self._ranks = [projection.rank for projection in projections]
        self._R = -(-sum(self._ranks) // _ALIGNMENT) * _ALIGNMENT
        self._pitch = -(-(self._K + self._R) // _PITCH) * _PITCH if self._R else self._K
        self._A: Tensor | None = None

    def trained(self) -> list[Tensor | None]:
        """A and B of each projection in turn."""
        return [tensor for projection in self.projections for tensor in (projection.A, projection.B)]

    def room(self, tokens: int, like: Tensor) -> Tensor:
        """Memory for an input [M, K] in the dtype of ``like``, with room for x A^T behind each row."""
        return like.new_empty(tokens, self._pitch)[:, : self._K]

    def narrow(self, x_MK: Tensor) -> Tensor | None:
        """x A^T [M, R]; None without adapters."""
        return x_MK @ self._stacked_A(x_MK.dtype).T if self._R else None

    def forward(self, x_MK: Tensor, narrow_MR: Tensor | None) -> Tensor:
        """The outputs side by side [M, N]."""
        weight, bias = self._weight(x_MK.dtype), self._bias(x_MK.dtype)
        if narrow_MR is None:
            return F.linear(x_MK, weight, bias)
        if x_MK.stride(0) == self._pitch:  # it has room
            extended = x_MK.as_strided((x_MK.shape[0], self._K + self._R), x_MK.stride())
            extended[:, self._K :] = narrow_MR
            return F.linear(extended, weight, bias)
        return F.linear(x_MK, weight[:, : self._K], bias).addmm_(narrow_MR, weight[:, self._K :].T)

    def backward(self, grad_MN: Tensor, x_MK: Tensor, narrow_MR: Tensor | None, *, wants_x: bool = True) -> Gradients:
        """The gradients, given those by the outputs [M, N]."""
        grad_x, grad_narrow_MR = self.input_gradients(grad_MN) if wants_x else (None, self._narrow_gradient(grad_MN))
        return Gradients(grad_x, self.adapter_gradients(grad_MN, x_MK, narrow_MR, grad_narrow_MR))

    def input_gradients(self, grad_MN: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those by x [M, K], whose rows may have room behind them, and by x A^T [M, R]: one product gives both."""
        both = grad_MN @ self._weight(grad_MN.dtype)
        if not self._R:
            return both, None
        grad_x, grad_narrow_MR = both[:, : self._K], both[:, self._K :]
        return grad_x.addmm_(grad_narrow_MR, self._stacked_A(grad_MN.dtype)), grad_narrow_MR

    def _narrow_gradient(self, grad_MN: Tensor) -> Tensor | None:
        if not self._R:
            return None
        block_NR = grad_MN.new_empty(grad_MN.shape[1], self._R)
        self._put_B(block_NR)
        return grad_MN @ block_NR

    def adapter_gradients(
        self, grad_MN: Tensor, x_MK: Tensor, narrow_MR: Tensor | None, grad_narrow_MR: Tensor | None
    ) -> list[Tensor | None]:
        """By A and B of each projection in turn, in their parameters' dtypes; None without an adapter."""
        if narrow_MR is None or grad_narrow_MR is None:
            return [None] * (2 * len(self.projections))
        grad_A = grad_narrow_MR.T @ x_MK
        grads: list[Tensor | None] = []
        for projection, rows, columns in self._places():
            if projection.A is None or projection.B is None:
                grads += [None, None]
                continue
            grad_n, narrow_r = grad_MN[:, rows], narrow_MR[:, columns]
            # beta = 0: the first argument gives the result its dtype and nothing else
            grad_B = torch.addmm(narrow_MR[:1, :1], grad_n.T, narrow_r, beta=0, alpha=projection.scaling)
            grads += [grad_A[columns].to(projection.A.dtype), grad_B.to(projection.B.dtype)]
        return grads

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """(W | s B): the weights one below the other and the adapters behind them, [N, K + R] in ``dtype``."""
        first = self.projections[0]
        if not self._R and len(self.projections) == 1 and first.plain is not None:
            return first.plain.to(dtype)
        room = torch.empty(sum(self._widths), self._pitch, dtype=dtype, device=first.device)
        if not self._dequantized_at_once(room):
            for projection, rows, _ in self._places():
                projection.put_weight(room[rows, : self._K])
            if self._R:
                self._put_B(room[:, self._K : self._K + self._R])
        return room[:, : self._K + self._R]

    def _dequantized_at_once(self, room: Tensor) -> bool:
        """Whether one kernel has written (W | s B) to ``room``."""
        packed = [projection.packed for projection in self.projections]
        weights = [weight for weight in packed if weight is not None]
        if len(weights) < len(packed) or len({weight.quant_format for weight in weights}) > 1:
            return False
        adapted = [
            (weight, projection.B, projection.scaling, columns.start)
            for weight, (projection, _, columns) in zip(weights, self._places(), strict=True)
        ]
        return backends.dequantize_adapted(adapted, room, self._R)

    def _put_B(self, block_NR: Tensor) -> None:
        """Each s_i B_i at its rows and columns, and zeros elsewhere."""
        if len(self.projections) > 1 or self._ranks[0] != self._R:
            block_NR.zero_()
        for projection, rows, columns in self._places():
            if projection.B is not None:
                torch.mul(projection.B, projection.scaling, out=block_NR[rows, columns])

    def _stacked_A(self, dtype: torch.dtype) -> Tensor:
        """[R, K]; kept for the backward, which multiplies with it too."""
        if self._A is None:
            parts = [projection.A for projection in self.projections if projection.A is not None]
            missing = self._R - sum(self._ranks)
            if missing:
                parts.append(parts[0].new_zeros(missing, self._K))
            self._A = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)
        return self._A

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        if all(projection.bias is None for projection in self.projections):
            return None
        device = self.projections[0].device
        biases = [torch.zeros(p.out_features, device=device) if p.bias is None else p.bias for p in self.projections]
        return torch.cat([bias.to(dtype) for bias in biases])

    def _places(self) -> Iterator[tuple[Projection, slice, slice]]:
        """Each projection, its output's columns, and its adapter's among the narrow ones."""
        row = column = 0
        for projection, n, r in zip(self.projections, self._widths, self._ranks, strict=True):
            yield projection, slice(row, row + n), slice(column, column + r)
            row, column = row + n, column + r


def _there(value: _T | None) -> _T:
    assert value is not None
    return value
