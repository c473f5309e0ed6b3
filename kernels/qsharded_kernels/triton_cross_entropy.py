"""Softmax cross-entropy of a chunk of logits and its gradient over bf16; interpreted without a GPU.

    loss = log(sum_v exp(l_v)) - l_target,  d l_v = softmax(l)_v - [v = target]

With a soft-cap c, l = c tanh(x / c) of the logits x, and d x_v = d l_v (1 - (l_v / c)^2).

A program takes a token: it reads the row for the maximum and the sum, and once more to write the gradient over it.
Where ranks hold a part of the vocabulary each, these are two kernels: between them the ranks put their sums together.
Computed in fp32.

Axes: C tokens of a chunk, V vocabulary, v a rank's part of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16  # 16 values a thread


ELSEWHERE = -(1 << 62)
"""A target that lies in another rank's part of the vocabulary."""


def forward_(logits_CV: Tensor, targets_C: Tensor, ignore: int, softcap: float | None = None) -> Tensor:
    """fp32 [C] losses; ``logits`` [C, V] become their gradient, in place. ``targets``: int64 [C]; those that equal
    ``ignore`` have no loss and no gradient, and one that is outside of [0, V) otherwise has a loss of NaN."""
    loss_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
    _launch(_kernel, logits_CV, (targets_C, loss_C), ignore, softcap)
    return loss_C


def sums(logits_Cv: Tensor, targets_C: Tensor, softcap: float | None = None) -> Tensor:
    """fp32 [3, C] of a rank's logits [C, v]: the largest, the sum of exp(logit - largest), and the target's.

    Args:
        targets_C: int64, columns of these logits; at ``ELSEWHERE`` the target's logit is 0, and NaN at others outside
            of [0, v).
    """
    sums_3C = torch.empty(3, logits_Cv.shape[0], dtype=torch.float32, device=logits_Cv.device)
    _launch(_sums_kernel, logits_Cv, (targets_C, sums_3C), ELSEWHERE, softcap)
    return sums_3C


def gradient_(
    logits_Cv: Tensor, targets_C: Tensor, log_sum_C: Tensor, counts_C: Tensor, softcap: float | None = None
) -> None:
    """A rank's logits [C, v] become their gradient, in place.

    Args:
        targets_C: as for :func:`sums`.
        log_sum_C: fp32, log(sum of exp(logit)) over all of the vocabulary.
        counts_C: boolean; False where the gradient is 0.
    """
    _launch(_gradient_kernel, logits_Cv, (targets_C, log_sum_C), counts_C, softcap)


def _launch(
    kernel: triton.JITFunction,
    logits: Tensor,
    of_tokens: tuple[Tensor, Tensor],
    further: Tensor | int,
    softcap: float | None,
) -> None:
    """A program for each row of the logits."""
    tokens, columns = logits.shape
    assert all(tensor.is_contiguous() for tensor in (logits, *of_tokens))
    with torch.cuda.device_of(logits):
        kernel[(tokens,)](
            logits,
            *of_tokens,
            further,
            columns,
            float(softcap or 1.0),
            CAPS=softcap is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(columns)),
            num_warps=_WARPS,
        )


@triton.jit
def _capped(x, cap, CAPS: tl.constexpr):
    if CAPS:
        # tanh(u) = 1 - 2 / (1 + exp(2u)), which is right at both ends of exp
        x = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap)))
    return x


@triton.jit
def _largest_and_sum(row_ptr, V, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row: its largest logit, and the sum of exp(logit - largest)."""
    column = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + column < V
        logit = tl.load(row_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        logit = tl.where(inside, _capped(logit, cap, CAPS), -float("inf"))
        new = tl.maximum(largest, logit)
        # a lane that has seen nothing yet holds -inf, whose difference to itself is not a number
        total = tl.where(new == -float("inf"), 0.0, total * tl.exp(largest - new) + tl.exp(logit - new))
        largest = new
    top = tl.max(largest, axis=0)
    return top, tl.sum(tl.where(largest == -float("inf"), 0.0, total * tl.exp(largest - top)), axis=0)


@triton.jit
def _write_gradient(row_ptr, V, target, log_sum, counts, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Over a row of logits."""
    column = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        inside = start + column < V
        logit = _capped(tl.load(row_ptr + start + column, mask=inside, other=0.0).to(tl.float32), cap, CAPS)
        grad = tl.exp(logit - log_sum) - tl.where(start + column == target, 1.0, 0.0)
        if CAPS:
            grad *= 1.0 - (logit / cap) * (logit / cap)
        grad = tl.where(counts, grad, 0.0)
        tl.store(row_ptr + start + column, grad.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kernel(logits_ptr, targets_ptr, loss_ptr, ignore, V, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * V
    target = tl.load(targets_ptr + token)
    counts = target != ignore
    exists = (target >= 0) & (target < V)
    # Read ahead of the sums, which all warps wait for: no warp has written the gradient over it then.
    chosen = _capped(tl.load(logits_ptr + target, mask=exists, other=float("nan")).to(tl.float32), cap, CAPS)
    top, total = _largest_and_sum(logits_ptr, V, cap, CAPS, BLOCK)
    log_sum = top + tl.log(total)
    tl.store(loss_ptr + token, tl.where(counts, log_sum - chosen, 0.0))
    _write_gradient(logits_ptr, V, target, log_sum, counts, cap, CAPS, BLOCK)


@triton.jit
def _sums_kernel(logits_ptr, targets_ptr, sums_ptr, elsewhere, v, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr):
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    logits_ptr += token * v
    target = tl.load(targets_ptr + token)
    exists = (target >= 0) & (target < v)
    chosen = _capped(tl.load(logits_ptr + target, mask=exists, other=float("nan")).to(tl.float32), cap, CAPS)
    top, total = _largest_and_sum(logits_ptr, v, cap, CAPS, BLOCK)
    tl.store(sums_ptr + token, top)
    tl.store(sums_ptr + tokens + token, total)
    tl.store(sums_ptr + 2 * tokens + token, tl.where(target == elsewhere, 0.0, chosen))


@triton.jit
def _gradient_kernel(logits_ptr, targets_ptr, log_sum_ptr, counts_ptr, v, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    target, log_sum = tl.load(targets_ptr + token), tl.load(log_sum_ptr + token)
    counts = tl.load(counts_ptr + token)
    _write_gradient(logits_ptr + token * v, v, target, log_sum, counts, cap, CAPS, BLOCK)
