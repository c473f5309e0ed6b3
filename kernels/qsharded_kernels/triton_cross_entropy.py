"""Softmax cross-entropy of a chunk of logits and its gradient, in one pass over bf16; interpreted without a GPU.

    loss = log(sum_v exp(l_v)) - l_target,  d l_v = softmax(l)_v - [v = target]

With a soft-cap c, l = c tanh(x / c) of the logits x, and d x_v = d l_v (1 - (l_v / c)^2).

A program takes a token: it reads the row for the maximum and the sum, and once more to write the gradient over it.
Computed in fp32.

Axes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16  # 16 values a thread


def forward_(logits_CV: Tensor, targets_C: Tensor, ignore: int, softcap: float | None = None) -> Tensor:
    """fp32 [C] losses; ``logits`` [C, V] become their gradient, in place. ``targets``: int64 [C]; those that equal
    ``ignore`` have no loss and no gradient, and one that is outside of [0, V) otherwise has a loss of NaN."""
    C, V = logits_CV.shape
    assert logits_CV.is_contiguous()
    loss_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    with torch.cuda.device_of(logits_CV):
        _kernel[(C,)](
            logits_CV,
            targets_C,
            loss_C,
            V,
            ignore,
            float(softcap or 1.0),
            CAPS=softcap is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(V)),
            num_warps=_WARPS,
        )
    return loss_C


@triton.jit
def _capped(x, cap, CAPS: tl.constexpr):
    if CAPS:
        # tanh(u) = 1 - 2 / (1 + exp(2u)), which is right at both ends of exp
        x = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap)))
    return x


@triton.jit
def _kernel(logits_ptr, targets_ptr, loss_ptr, V, ignore, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * V
    target = tl.load(targets_ptr + token)
    counts = target != ignore
    exists = (target >= 0) & (target < V)
    # Read ahead of the sums, which all warps wait for: no warp has written the gradient over it then.
    chosen = _capped(tl.load(logits_ptr + target, mask=exists, other=float("nan")).to(tl.float32), cap, CAPS)
    column = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + column < V
        logit = tl.load(logits_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        logit = tl.where(inside, _capped(logit, cap, CAPS), -float("inf"))
        new = tl.maximum(largest, logit)
        # a lane that has seen nothing yet holds -inf, whose difference to itself is not a number
        total = tl.where(new == -float("inf"), 0.0, total * tl.exp(largest - new) + tl.exp(logit - new))
        largest = new
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(tl.where(largest == -float("inf"), 0.0, total * tl.exp(largest - top)), axis=0))
    tl.store(loss_ptr + token, tl.where(counts, log_sum - chosen, 0.0))
    for start in range(0, V, BLOCK):
        inside = start + column < V
        logit = _capped(tl.load(logits_ptr + start + column, mask=inside, other=0.0).to(tl.float32), cap, CAPS)
        grad = tl.exp(logit - log_sum) - tl.where(start + column == target, 1.0, 0.0)
        if CAPS:
            grad *= 1.0 - (logit / cap) * (logit / cap)
        grad = tl.where(counts, grad, 0.0)
        tl.store(logits_ptr + start + column, grad.to(logits_ptr.dtype.element_ty), mask=inside)
