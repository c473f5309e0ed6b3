"""Attention with a sink in each head: one more score in the softmax, to which no value belongs.

With a sink z the probabilities of the keys are exp(s - L), L = log(exp(z) + sum exp(s)): attention without it, whose
log-sum-exp is l, times exp(l - L) = sigmoid(l - z). Its backward, too, is the usual one once it is given L for l and
the smaller output: dS = P (dP - <dO, O>) has both in it. So FlashAttention's kernels serve, which return l and take it.

Sinks are frozen. Axes: B rows, S tokens of a row, T keys, H query heads, E head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.models.attention_inputs import AttentionInputs


def with_sinks(out_BSHE: Tensor, log_sum_exp: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (fp32 [B, H, S], or [H, B S] of rows end to end) as the sinks make them."""
    sinks_H1 = sinks_H.float()[:, None]
    kept = torch.sigmoid(log_sum_exp - sinks_H1).transpose(-2, -1).reshape(out_BSHE.shape[:3])
    return out_BSHE * kept.to(out_BSHE.dtype)[..., None], torch.logaddexp(log_sum_exp, sinks_H1)


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    """[B, S, H, E] by PyTorch's own attention: the sink is a key of zeros, whose score a mask adds."""
    assert inputs.sinks_H is not None
    q_BHSE, k_BHTE, v_BHTE = _repeated(q, k, v)
    S, T = q_BHSE.shape[2], k_BHTE.shape[2]
    sees_BST = inputs.mask_BST
    if sees_BST is None:  # causal, or one query that sees every key
        sees_BST = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)[None, None]
    hidden_BST = torch.zeros_like(sees_BST, dtype=q.dtype).masked_fill(~sees_BST, -torch.inf)
    sinks_BHS1 = inputs.sinks_H.to(q.dtype)[:, None, None].expand(hidden_BST.shape[0], -1, S, 1)
    scores_BHS = torch.cat((hidden_BST.expand(-1, q_BHSE.shape[1], -1, -1), sinks_BHS1), dim=-1)
    k_BHTE, v_BHTE = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (k_BHTE, v_BHTE))
    out_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHTE, v_BHTE, attn_mask=scores_BHS, scale=inputs.scale)
    return out_BHSE.transpose(1, 2)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, ., E]: keys and values once for each query head."""
    q_BHSE, k_BGTE, v_BGTE = (tensor.transpose(1, 2) for tensor in (q, k, v))
    groups = q_BHSE.shape[1] // k_BGTE.shape[1]
    return q_BHSE, k_BGTE.repeat_interleave(groups, dim=1), v_BGTE.repeat_interleave(groups, dim=1)
