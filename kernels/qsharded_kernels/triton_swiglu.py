"""SwiGLU's activation in Triton, forward and backward; interpreted where there is no GPU.

    act = f(gate) * up,  f(g) = g * sigmoid(z)
    d gate = d act * up * sigmoid(z) * (1 + g * (1 - sigmoid(z)) * dz/dg),  d up = d act * f(g)

z = g for silu. gelu as tanh approximates it is of this form too: (1 + tanh(u)) / 2 = sigmoid(2u), so that
z = 2 sqrt(2 / pi) (g + 0.044715 g^3).

Gate and up are the two halves of one matrix [M, 2J], as one product of both projections writes them. Computed in fp32.

Axes: M tokens, J intermediate size.
Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 8  # 8 values a thread: one 16-byte load of bf16 from each input


def forward(gate_up: Tensor, out: Tensor | None = None, activation: str = "silu") -> Tensor:
    """act [M, J] of ``gate_up`` [M, 2J]. ``out``: its memory, with rows of J values in a run. ``activation``: "silu" or
    "gelu_tanh"."""
    M, J = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    act = gate_up.new_empty(M, J) if out is None else out
    assert act.stride(1) == 1
    with torch.cuda.device_of(gate_up):
        _forward_kernel[(triton.cdiv(J, _BLOCK), M)](
            gate_up, act, J, act.stride(0), GELU=activation == "gelu_tanh", BLOCK=_BLOCK, num_warps=_WARPS
        )
    return act


def backward_(grad_act: Tensor, gate_up: Tensor, activation: str = "silu") -> None:
    """In place: ``gate_up`` [M, 2J] becomes its gradient, and ``grad_act`` [M, J], whose rows are J values in a run,
    becomes act, which backward of the down-projection reads."""
    M, J = grad_act.shape
    assert grad_act.stride(1) == 1
    assert gate_up.is_contiguous()
    assert gate_up.shape == (M, 2 * J)
    with torch.cuda.device_of(gate_up):
        _backward_kernel[(triton.cdiv(J, _BLOCK), M)](
            grad_act,
            gate_up,
            J,
            grad_act.stride(0),
            GELU=activation == "gelu_tanh",
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


@triton.jit
def _sigmoid(gate, GELU: tl.constexpr):
    """sigmoid(z)."""
    z = gate
    if GELU:
        z = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    return tl.sigmoid(z)


@triton.jit
def _times_slope(value, gate, GELU: tl.constexpr):
    """value dz/dg."""
    if GELU:
        value = value * (1.5957691216057308 * (1.0 + 0.134145 * gate * gate))
    return value


@triton.jit
def _forward_kernel(gate_up_ptr, act_ptr, J, act_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < J
    gate = tl.load(gate_up_ptr + token * 2 * J + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * J + J + column, mask=inside, other=0.0).to(tl.float32)
    act = gate * _sigmoid(gate, GELU) * up
    tl.store(act_ptr + token * act_stride + column, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_act_ptr, gate_up_ptr, J, act_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < J
    at_gate = token * 2 * J + column
    gate = tl.load(gate_up_ptr + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at_gate + J, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_act_ptr + token * act_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate, GELU)
    activated = gate * sigmoid
    grad_gate = grad * up * sigmoid * (1.0 + _times_slope(gate * (1.0 - sigmoid), gate, GELU))
    kept = gate_up_ptr.dtype.element_ty
    tl.store(gate_up_ptr + at_gate, grad_gate.to(kept), mask=inside)
    tl.store(gate_up_ptr + at_gate + J, (grad * activated).to(kept), mask=inside)
    tl.store(grad_act_ptr + token * act_stride + column, (activated * up).to(kept), mask=inside)
