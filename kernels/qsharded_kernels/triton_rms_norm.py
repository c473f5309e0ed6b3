"""RMSNorm in Triton, forward and backward, each with the residual addition beside it; interpreted without a GPU.

    h = x + r,  rstd = 1 / sqrt(mean(h^2) + eps),  y = h * rstd * w
    dh = rstd * (w dy - h * rstd^2 * mean(w dy h)) + dr

Everything is computed in fp32 and rounded once. A program takes a token; the callers check shapes.

Axes: M tokens, D hidden size.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def forward(
    x_MD: Tensor, weight_D: Tensor, eps: float, residual_MD: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, D] in x's dtype, rstd fp32 [M], h [M, D]); h is ``x`` itself where no ``residual`` is added to it.

    ``out``: y's memory, with rows of D values in a run.
    """
    M, D = x_MD.shape
    assert x_MD.is_contiguous(), "rows are read as D values in a run"
    assert residual_MD is None or (residual_MD.shape == x_MD.shape and residual_MD.is_contiguous())
    y_MD = torch.empty_like(x_MD) if out is None else out
    assert y_MD.stride(1) == 1
    rstd_M = torch.empty(M, dtype=torch.float32, device=x_MD.device)
    h_MD = x_MD if residual_MD is None else torch.empty_like(x_MD)
    with torch.cuda.device_of(x_MD):
        _forward_kernel[(M,)](
            x_MD,
            x_MD if residual_MD is None else residual_MD,
            weight_D,
            h_MD,
            y_MD,
            rstd_M,
            D,
            y_MD.stride(0),
            eps,
            ADD=residual_MD is not None,
            BLOCK=triton.next_power_of_2(D),
            num_warps=_warps(D),
        )
    return y_MD, rstd_M, h_MD


def backward(
    grad_y_MD: Tensor, h_MD: Tensor, weight_D: Tensor, rstd_M: Tensor, grad_residual_MD: Tensor | None
) -> Tensor:
    """The gradient by h [M, D]: through the norm, and ``grad_residual`` on the way around it. ``grad_y``'s rows are D
    values in a run."""
    M, D = h_MD.shape
    assert grad_y_MD.stride(1) == 1
    assert h_MD.is_contiguous()
    assert grad_residual_MD is None or grad_residual_MD.is_contiguous()
    grad_h_MD = torch.empty_like(h_MD)
    with torch.cuda.device_of(h_MD):
        _backward_kernel[(M,)](
            grad_y_MD,
            h_MD,
            weight_D,
            rstd_M,
            grad_y_MD if grad_residual_MD is None else grad_residual_MD,
            grad_h_MD,
            D,
            grad_y_MD.stride(0),
            ADD=grad_residual_MD is not None,
            BLOCK=triton.next_power_of_2(D),
            num_warps=_warps(D),
        )
    return grad_h_MD


def _warps(D: int) -> int:
    """8 values a thread, as far as a thread block goes: one 16-byte load of bf16 each."""
    return min(16, max(1, triton.next_power_of_2(D) // 256))


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    h_ptr,
    y_ptr,
    rstd_ptr,
    D,
    y_stride,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = token * D + column
    h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)  # what is stored is what is normalised
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * y_stride + column, (h * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + token, rstd)


@triton.jit
def _backward_kernel(
    grad_y_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    grad_residual_ptr,
    grad_h_ptr,
    D,
    grad_y_stride,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = token * D + column
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y_ptr + token * grad_y_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + token)
    grad_h = rstd * (grad - h * (rstd * rstd * tl.sum(grad * h, axis=0) / D))
    if ADD:
        grad_h += tl.load(grad_residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_h_ptr + at, grad_h.to(grad_h_ptr.dtype.element_ty), mask=inside)
