"""What lies between the products of a mixture's experts, in Triton; interpreted where there is no GPU.

    combine           out[m] = sum over j of scores[m, j] y[position[m, j]]
    swiglu            h = silu(gate) up
    swiglu_backward   from g = the gradient by h before its row's score s: h, the gradients s g up silu'(gate) and
                      s g silu(gate), and <g, h>

All are computed in fp32 and rounded once. A token's rows are added in the order of its choices.

Axes: M tokens, k choices of a token, R rows sorted by expert, D hidden size, J intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


def combine(y_RD: Tensor, position_Mk: Tensor, scores_Mk: Tensor | None) -> Tensor:
    """[M, D] in y's dtype. ``position_Mk``: int32; -1 is no row. Without scores they are 1."""
    (M, k), D = position_Mk.shape, y_RD.shape[1]
    out_MD = torch.empty(M, D, dtype=y_RD.dtype, device=y_RD.device)
    if M == 0 or D == 0:
        return out_MD
    scores_Mk = None if scores_Mk is None else scores_Mk.contiguous()
    assert y_RD.is_contiguous()
    assert position_Mk.is_contiguous()
    block = min(_COLUMNS, triton.next_power_of_2(D))
    with torch.cuda.device_of(y_RD):
        _combine_kernel[(M, triton.cdiv(D, block))](
            *(y_RD, position_Mk, y_RD if scores_Mk is None else scores_Mk, out_MD),
            D,
            k,
            SCORED=scores_Mk is not None,
            BLOCK=block,
        )
    return out_MD


def swiglu(gate_RJ: Tensor, up_RJ: Tensor) -> Tensor:
    """h [R, J] in gate's dtype."""
    h_RJ = torch.empty_like(gate_RJ)
    if not h_RJ.numel():
        return h_RJ
    assert gate_RJ.is_contiguous()
    assert up_RJ.is_contiguous()
    with torch.cuda.device_of(h_RJ):
        _swiglu_kernel[(triton.cdiv(h_RJ.numel(), _COLUMNS),)](gate_RJ, up_RJ, h_RJ, h_RJ.numel(), BLOCK=_COLUMNS)
    return h_RJ


def swiglu_backward(gate_RJ: Tensor, up_RJ: Tensor, grad_RJ: Tensor, scores_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h [R, J], the gradients by gate and by up behind each other [R, 2J], and <g, h> fp32 [R]."""
    R, J = gate_RJ.shape
    h_RJ, grads_R2J = torch.empty_like(gate_RJ), gate_RJ.new_empty(R, 2 * J)
    dots_R = torch.empty(R, dtype=torch.float32, device=gate_RJ.device)
    assert all(part.is_contiguous() for part in (gate_RJ, up_RJ, grad_RJ, scores_R))
    if R:
        with torch.cuda.device_of(gate_RJ):
            _swiglu_backward_kernel[(R,)](
                *(gate_RJ, up_RJ, grad_RJ, scores_R, h_RJ, grads_R2J, dots_R),
                J,
                BLOCK=min(_COLUMNS, triton.next_power_of_2(J)),
            )
    return h_RJ, grads_R2J, dots_R


@triton.jit
def _combine_kernel(y_ptr, position_ptr, scores_ptr, out_ptr, D, k, SCORED: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    sum_D = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        row = tl.load(position_ptr + m * k + j).to(tl.int64)
        # what no expert computed may hold anything, so it is not read
        y_D = tl.load(y_ptr + row * D + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        if SCORED:
            y_D *= tl.load(scores_ptr + m * k + j).to(tl.float32)
        sum_D += y_D
    tl.store(out_ptr + m * D + column, sum_D.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, h_ptr, values, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, (gate * tl.sigmoid(gate) * up).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(gate_ptr, up_ptr, grad_ptr, scores_ptr, h_ptr, grads_ptr, dots_ptr, J, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    score = tl.load(scores_ptr + row).to(tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, J, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < J
        gate = tl.load(gate_ptr + row * J + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * J + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * J + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        h = gate * sigmoid * up
        dot += grad * h
        grad *= score
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        kind = h_ptr.dtype.element_ty
        tl.store(h_ptr + row * J + column, h.to(kind), mask=inside)
        tl.store(grads_ptr + row * 2 * J + column, grad_gate.to(kind), mask=inside)
        tl.store(grads_ptr + row * 2 * J + J + column, (grad * gate * sigmoid).to(kind), mask=inside)
    tl.store(dots_ptr + row, tl.sum(dot, 0))
