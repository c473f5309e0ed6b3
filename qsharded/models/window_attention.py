"""A sliding window as two causal attentions, for kernels that know no windows.

Rows are cut into chunks as long as the window W. A query sees of its own chunk what is before it, and of the chunk
before, its place among W being i, the keys behind place i. With queries and keys in opposite order these too are a
causal triangle; query W - 1, which sees none of them, is put at its end, where its result is passed over. The two
results are merged by their log-sum-exps, as ring attention merges them; given the merged output and log-sum-exp, each
kernel's backward yields its part of the gradients.

                     own chunk          chunk before
    query 0          x . . .            query 2   x . . .
    query 1          x x . .            query 1   x x . .
    query 2          x x x .            query 0   x x x .
    query 3          x x x x            query 3   - - - -
    of keys          0 1 2 3                      3 2 1 0

Axes: B rows, S tokens of a row, n chunks of a row, W the window, H query heads, G key-value heads, E head dim.
Source: Liu et al., "Ring Attention", arXiv:2310.01889, for the merging.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.models.attention_inputs import AttentionInputs
from qsharded.quant.backends import takes_triton
from qsharded.utils.documents import Boundaries

Saved = tuple[Any, ...]
_KEYS, _QUERIES = 0, 1  # of two chunks that follow each other: the first one's, and the second one's
_AGREEMENT = 0.01  # relative; each backend lies 0.2 to 0.3% from exact results in bf16


class CausalAttention(Protocol):
    """Attention to all earlier keys of a row; the first that it saves is the log-sum-exp of the scores, fp32
    [B, H, S] or [B, H, S, 1], and its backward uses no more of the forward than this and the output it is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class WindowAttention:
    """Sliding windows by a kernel that is causal alone, in rows of one document each."""

    def __init__(self, causal: CausalAttention) -> None:
        self._causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]:
        chunks = _Chunks.of(q, inputs)
        q, k, v = (chunks.cut(tensor) for tensor in (q, k, v))
        own, (log_sum, *rest_own) = self._causal.forward(q, k, v, chunks.inputs)
        before, (log_sum_before, *rest_before) = self._causal.forward(*chunks.before(q, k, v), chunks.inputs)
        shape, shape_before = log_sum.shape, log_sum_before.shape
        chunks.merge_(own, log_sum.view(shape[:3]), before, log_sum_before.view(shape_before[:3]))
        return chunks.join(own), (log_sum, tuple(rest_own), shape_before, tuple(rest_before))

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_sum, rest_own, shape_before, rest_before = saved
        chunks = _Chunks.of(q, inputs)
        grad, q, k, v, out = (chunks.cut(tensor) for tensor in (grad, q, k, v, out))
        grads = self._causal.backward(grad, q, k, v, out, (log_sum, *rest_own), chunks.inputs)
        flipped_grad = chunks.mirrored(grad, _QUERIES)
        flipped_grad[:, -1] = 0  # of the query that sees nothing
        flipped = flipped_grad, *chunks.before(q, k, v), chunks.mirrored(out, _QUERIES)
        of_queries = chunks.mirrored(log_sum.view(log_sum.shape[:3]).transpose(1, 2)[..., None], _QUERIES)
        saved_before = (of_queries[..., 0].transpose(1, 2).contiguous().view(shape_before), *rest_before)
        grads_before = self._causal.backward(*flipped, saved_before, chunks.inputs)
        for total, part, side in zip(grads, grads_before, (_QUERIES, _KEYS, _KEYS), strict=True):
            chunks.add_mirrored_(total, part, side)
        grad_q, grad_k, grad_v = map(chunks.join, grads)
        return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Chunks:
    """Rows cut into chunks: tensors [B n, W, ...], the last chunk of a row filled up with zeros."""

    rows: int
    length: int
    window: int
    inputs: AttentionInputs

    @classmethod
    def of(cls, q: Tensor, inputs: AttentionInputs) -> "_Chunks":
        assert inputs.window is not None
        return cls(q.shape[0], q.shape[1], inputs.window, replace(inputs, window=None, boundaries=None))

    @property
    def of_row(self) -> int:
        return -(-self.length // self.window)

    def cut(self, tensor: Tensor) -> Tensor:
        """[B, S, H, E] -> [B n, W, H, E]."""
        missing = self.of_row * self.window - self.length
        filled = F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
        return filled.unflatten(1, (self.of_row, self.window)).flatten(0, 1)

    def join(self, tensor: Tensor) -> Tensor:
        """[B n, W, H, E] -> [B, S, H, E]."""
        return tensor.unflatten(0, (self.rows, self.of_row)).flatten(1, 2)[:, : self.length]

    def apart(self, tensor: Tensor) -> Tensor:
        """[B m, ...] -> [B, m, ...], m being n, or n - 1 of what concerns a chunk and the one before it."""
        return tensor.unflatten(0, (self.rows, -1))

    def late(self, tensor: Tensor) -> Tensor:
        """The queries that see keys of the chunk before theirs: a view [B, n - 1, W - 1, ...]."""
        return self.apart(tensor)[:, 1:, :-1]

    def mirrored(self, tensor: Tensor, side: int) -> Tensor:
        """A side's tokens in opposite order, [B (n - 1), W, ...]; of queries, the one that sees none is the last."""
        if takes_triton(tensor):
            from qsharded_kernels import triton_mirror  # here: Triton loads slowly

            return triton_mirror.mirrored(tensor, self.of_row, side)
        if side == _KEYS:
            return self.apart(tensor)[:, :-1].flip(2).flatten(0, 1)
        return torch.cat((self.late(tensor).flip(2), self.apart(tensor)[:, 1:, -1:]), dim=2).flatten(0, 1)

    def add_mirrored_(self, total: Tensor, part: Tensor, side: int) -> None:
        """To [B n, W, ...] what is mirrored, where it belongs; not the query that sees none."""
        if takes_triton(total):
            from qsharded_kernels import triton_mirror

            triton_mirror.add_mirrored_(total, part, self.of_row, side)
        elif side == _KEYS:
            self.apart(total)[:, :-1].add_(self.apart(part).flip(2))
        else:
            self.late(total).add_(self.apart(part)[:, :, :-1].flip(2))

    def before(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and the chunk before them, in opposite order."""
        return self.mirrored(q, _QUERIES), self.mirrored(k, _KEYS), self.mirrored(v, _KEYS)

    def merge_(self, out: Tensor, log_sum: Tensor, flipped: Tensor, flipped_log_sum: Tensor) -> None:
        """Into the own chunk's output [B n, W, H, E] and log-sum-exp [B n, H, W], those of the chunk before."""
        if takes_triton(out):
            from qsharded_kernels import triton_merge

            triton_merge.merge_(out, log_sum, flipped, flipped_log_sum, self.of_row)
            return
        one = self.late(log_sum.transpose(1, 2))[..., None]
        two = self.apart(flipped_log_sum.transpose(1, 2))[:, :, :-1].flip(2)[..., None]
        both = torch.logaddexp(one, two)
        merged = (one - both).exp() * self.late(out) + (two - both).exp() * self.apart(flipped)[:, :, :-1].flip(2)
        self.late(out).copy_(merged)
        one.copy_(both)


def agree(one: CausalAttention, other: CausalAttention, window: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether two backends give about the same output and gradients of such rows, to what bf16 allows."""
    inputs = AttentionInputs(q, q, window=window, boundaries=Boundaries.of_rows(q.shape[0], q.shape[1], q.device))
    results = []
    for attention in (one, other):
        out, saved = attention.forward(q, k, v, inputs)
        results.append((out, *attention.backward(q, q, k, v, out, saved, inputs)))
    gaps = [(a - b).float().norm() / b.float().norm() for a, b in zip(*results, strict=True)]
    return bool(torch.stack(gaps).max() <= _AGREEMENT)
