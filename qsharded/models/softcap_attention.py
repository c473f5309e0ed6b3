"""Attention with soft-capped scores, in plain PyTorch, a chunk of queries at a time: Gemma 2's.

    softmax(c tanh(scale q k^T / c)) v

No fused kernel of PyTorch's caps scores. The scores of one chunk are all that is ever held: what a query sees is found
from windows and documents for each chunk, so that no S x T mask exists, and the backward computes the chunk again.

Axes: B rows, S queries, T keys, C queries of a chunk, H query heads, G key-value heads, N = H / G, E head dim.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qsharded.models.attention_inputs import AttentionInputs

_SCORES_PER_CHUNK = 1 << 26
"""In fp32 256 MiB."""


class SoftcapAttention:
    """On any device and in any dtype; scores are capped and summed in fp32 at least."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, tuple[()]]:
        """q [B, S, H, E], k and v [B, T, G, E] -> [B, S, H, E]; nothing else is kept."""
        documents_BT = _documents(k, inputs)
        parts = [
            _attend_chunk(
                q[:, queries], k[:, keys], v[:, keys], _seen(q, k, queries, keys, documents_BT, inputs), inputs
            )
            for queries, keys in _chunks(q, k, inputs)
        ]
        return torch.cat(parts, dim=1), ()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[()], inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by q, k and v; those of keys add up over chunks in fp32 at least."""
        documents_BT = _documents(k, inputs)
        precise = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=precise), torch.zeros_like(v, dtype=precise)
        for queries, keys in _chunks(q, k, inputs):
            leaves = tuple(t.detach().requires_grad_() for t in (q[:, queries], k[:, keys], v[:, keys]))
            seen = _seen(q, k, queries, keys, documents_BT, inputs)
            with torch.enable_grad():
                again = _attend_chunk(leaves[0], leaves[1], leaves[2], seen, inputs)
            grad_q[:, queries], of_k, of_v = torch.autograd.grad(again, leaves, grad[:, queries])
            grad_k[:, keys] += of_k
            grad_v[:, keys] += of_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _chunks(q: Tensor, k: Tensor, inputs: AttentionInputs) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that any of them may see)."""
    (B, S, H, _), T = q.shape, k.shape[1]
    C = max(1, min(S, _SCORES_PER_CHUNK // (B * H * T)))
    for start in range(0, S, C):
        stop = min(start + C, S)
        first = T - S + start
        since = 0 if inputs.window is None else max(0, first - inputs.window + 1)
        yield slice(start, stop), slice(since, T - S + stop)


def _documents(k: Tensor, inputs: AttentionInputs) -> Tensor | None:
    """[B, T]: a number for each document, from where documents begin; found on the device."""
    if inputs.boundaries is None:
        return None
    B, T = k.shape[:2]
    place = torch.arange(B * T, device=k.device, dtype=inputs.boundaries.starts.dtype)
    return torch.searchsorted(inputs.boundaries.starts, place, right=True).view(B, T)


def _seen(
    q: Tensor, k: Tensor, queries: slice, keys: slice, documents_BT: Tensor | None, inputs: AttentionInputs
) -> Tensor:
    """[B or 1, 1, C, keys]: which of the keys each of the queries sees."""
    if inputs.mask_BST is not None:
        return inputs.mask_BST[..., queries, keys]
    cached = k.shape[1] - q.shape[1]
    key_T = torch.arange(keys.start, keys.stop, device=k.device)
    query_C1 = torch.arange(queries.start + cached, queries.stop + cached, device=k.device)[:, None]
    seen_BCT = (key_T <= query_C1)[None]
    if inputs.window is not None:
        seen_BCT = seen_BCT & (key_T > query_C1 - inputs.window)
    if documents_BT is not None:
        seen_BCT = seen_BCT & (documents_BT[:, queries, None] == documents_BT[:, None, keys])
    return seen_BCT[:, None]


def _attend_chunk(q_BCHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, seen: Tensor, inputs: AttentionInputs) -> Tensor:
    (C, H, E), G = q_BCHE.shape[1:], k_BTGE.shape[2]
    assert inputs.softcap is not None
    scale = E**-0.5 if inputs.scale is None else inputs.scale
    q_BGNCE = q_BCHE.transpose(1, 2).unflatten(1, (G, H // G))
    # the heads of a group are rows of one product
    scores = q_BGNCE.flatten(2, 3) @ k_BTGE.permute(0, 2, 3, 1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (scale / inputs.softcap)
    scores = (scores.tanh() * inputs.softcap).unflatten(2, (H // G, C))
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).to(v_BTGE.dtype)
    out_BGNCE = (weights.flatten(2, 3) @ v_BTGE.transpose(1, 2)).unflatten(2, (H // G, C))
    return out_BGNCE.flatten(1, 2).transpose(1, 2)
