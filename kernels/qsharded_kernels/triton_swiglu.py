"""SwiGLU's activation in Triton, forward and backward; interpreted where there is no GPU.

    act = silu(gate) * up,  silu(g) = g * sigmoid(g)
    d gate = d act * up * sigmoid(g) * (1 + g * (1 - sigmoid(g))),  d up = d act * silu(g)

Gate and up are the two halves of one matrix [M, 2J], as one product of both projections writes them. Computed in fp32.

Axes: M tokens, J intermediate size.
Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 8  # 8 values a thread: one 16-byte load of bf16 from each input


def forward(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """act [M, J] of ``gate_up`` [M, 2J]. ``out``: its memory, with rows of J values in a run."""
    M, J = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    act = gate_up.new_empty(M, J) if out is None else out
    assert act.stride(1) == 1
    with torch.cuda.device_of(gate_up):
        _forward_kernel[(triton.cdiv(J, _BLOCK), M)](gate_up, act, J, act.stride(0), BLOCK=_BLOCK, num_warps=_WARPS)
    return act


def backward_(grad_act: Tensor, gate_up: Tensor) -> None:
    """In place: ``gate_up`` [M, 2J] becomes its gradient, and ``grad_act`` [M, J], whose rows are J values in a run,
    becomes act, which backward of the down-projection reads."""
    M, J = grad_act.shape
    assert grad_act.stride(1) == 1
    assert gate_up.is_contiguous()
    assert gate_up.shape == (M, 2 * J)
    with torch.cuda.device_of(gate_up):
        _backward_kernel[(triton.cdiv(J, _BLOCK), M)](
            grad_act, gate_up, J, grad_act.stride(0), BLOCK=_BLOCK, num_warps=_WARPS
        )


@triton.jit
def _forward_kernel(gate_up_ptr, act_ptr, J, act_stride, BLOCK: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < J
    gate = tl.load(gate_up_ptr + token * 2 * J + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * J + J + column, mask=inside, other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_ptr + token * act_stride + column, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_act_ptr, gate_up_ptr, J, act_stride, BLOCK: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < J
    at_gate = token * 2 * J + column
    gate = tl.load(gate_up_ptr + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at_gate + J, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_act_ptr + token * act_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kept = gate_up_ptr.dtype.element_ty
    tl.store(gate_up_ptr + at_gate, (grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(kept), mask=inside)
    tl.store(gate_up_ptr + at_gate + J, (grad * silu).to(kept), mask=inside)
    tl.store(grad_act_ptr + token * act_stride + column, (silu * up).to(kept), mask=inside)
