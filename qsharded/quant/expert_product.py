"""The gated MLPs of a layer's experts as one autograd node: tokens in, their experts' weighted sum out.

One projection is dequantized at a time, of as many experts as fit ``DECODED_BYTES``: of all, or, in chunks, of those
that got tokens, for which the host waits for the counts. The backward decodes again. What waits for it is narrow: the
tokens [M, D] as they came, and gate and up [R, J] of each pair; neither the tokens sorted by expert nor the experts'
outputs [R, D] do. All else that is [R, D] lives once, since every chunk of experts writes its run of pairs. A token's k
outputs are added in the order of its choices, so that the result does not depend on which chunk or thread was first.

A pair's weight ("score") comes from the router, so its gradient is needed: <g, y> for the token's output gradient g and
the expert's output y. As y = W h + b + s B A h, that is <W^T g + s A^T B^T g, h> + <g, b>: y is not computed again.

Few tokens that need no gradient take another way (:mod:`qsharded.quant.few_tokens`).

Axes: M tokens, k experts a token, E experts, R pairs, c pairs of a chunk, D hidden size, J the experts' intermediate
size, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsharded.quant import few_tokens, grouped
from qsharded.quant.expert_mlp import ExpertMLP, Update
from qsharded.quant.expert_rows import Glu, add_grouped_, combine, glu_backward, glu_forward
from qsharded.quant.experts import ExpertWeights
from qsharded.quant.grouped import grouped_mm, grouped_outer
from qsharded.quant.routing import Chunk, Counts, Routed, whole

DECODED_BYTES = 512 << 20
"""The most that one projection's dequantized experts take at a time; one expert is always decoded whole."""


@torch.compiler.disable  # the host may read the counts of tokens
def expert_product(
    x_MD: Tensor,
    scores_Mk: Tensor,
    routed: Routed,
    mlp: ExpertMLP,
    update_in: Update | None = None,
    update_out: Update | None = None,
) -> Tensor:
    """Each token's sum of score * expert(token) over its experts, [M, D] in x's dtype; 0 where it has none.

    Gradients flow to ``x``, the scores and the updates; the matrices and biases are frozen.

    Args:
        update_in: of gate and up.
        update_out: of down.
    """
    weights = mlp.gate, mlp.up, mlp.down
    frozen = [tensor for part in weights for tensor in part.tensors]
    trained = [factor for update in (update_in, update_out) for factor in (update[:2] if update else (None, None))]
    if few_tokens.serves(x_MD, scores_Mk, routed, mlp, [factor for factor in trained if factor is not None]):
        return few_tokens.few_tokens(x_MD, scores_Mk, routed, mlp, (update_in, update_out))
    scalings = tuple(update.scaling if update else 0.0 for update in (update_in, update_out))
    is_whole = _is_whole(x_MD, routed, weights)
    counts = None if is_whole else routed.counts
    made = _Made(tuple((part.maker, len(part.tensors)) for part in weights), mlp.glu, scalings, counts)
    order_R = routed.order_P if counts is None else routed.order_P[: counts.pairs]
    sorting = order_R, routed.position_Mk, routed.ends_E if is_whole else None
    out: Tensor = _Experts.apply(x_MD, scores_Mk, *trained, made, *sorting, *mlp.biases, *frozen)
    return out


def _is_whole(x_MD: Tensor, routed: Routed, weights: Sequence[ExpertWeights]) -> bool:
    """Whether all experts are decoded at once, by what needs no counts on the host."""
    if not grouped.is_one_launch(x_MD) or x_MD.is_meta:
        return False
    fits = routed.experts * max(_matrix_bytes(part, x_MD.dtype) for part in weights) <= DECODED_BYTES
    rows = routed.chosen_Mk.numel() / routed.experts
    return fits and all(part.are_decoded(rows, x_MD) for part in weights)


class _Made(NamedTuple):
    """What of the product is no tensor."""

    makers: tuple[tuple[Callable[..., ExpertWeights], int], ...]
    glu: Glu
    scalings: tuple[float, ...]
    counts: Counts | None  # None: all experts at once, and the host does not know them


@dataclass
class _Work:
    """The tensors of a forward or a backward, and the steps that both take."""

    x_MD: Tensor
    scores_Mk: Tensor
    order_R: Tensor
    position_Mk: Tensor
    ends_E: Tensor | None
    updates: tuple[Update | None, Update | None]
    weights: list[ExpertWeights]
    biases: Sequence[Tensor | None]
    made: _Made

    @classmethod
    def of(cls, x_MD: Tensor, scores_Mk: Tensor, trained: Sequence[Tensor | None], made: _Made, *rest: Any) -> "_Work":
        order_R, position_Mk, ends_E, *biases = rest[:6]
        tensors = iter(rest[6:])
        weights = [make(*(next(tensors) for _ in range(count))) for make, count in made.makers]
        pairs = zip(trained[::2], trained[1::2], made.scalings, strict=True)
        update_in, update_out = (None if A is None or B is None else Update(A, B, scaling) for A, B, scaling in pairs)
        updates = update_in, update_out
        return cls(x_MD, scores_Mk, order_R, position_Mk, ends_E, updates, weights, biases, made)

    @property
    def pairs(self) -> int:
        """R."""
        return self.order_R.shape[0]

    def chunks(self) -> list[Chunk]:
        """Of experts that are decoded together."""
        if self.made.counts is None:
            assert self.ends_E is not None
            return [whole(self.ends_E, self.pairs)]
        matrix = max(_matrix_bytes(part, self.x_MD.dtype) for part in self.weights)
        return list(self.made.counts.chunks(max(1, DECODED_BYTES // matrix), self.x_MD.device))

    def forward_chunks(self) -> list[Chunk]:
        """All at once where kernels decode none to memory, as for few tokens of each."""
        counts = self.made.counts
        hit = 0 if counts is None else sum(count > 0 for count in counts.of_expert)
        if counts and hit and not any(part.are_decoded(counts.pairs / hit, self.x_MD) for part in self.weights):
            return list(counts.chunks(hit, self.x_MD.device))
        return self.chunks()

    def tokens(self, source_MD: Tensor, chunk: Chunk) -> Tensor:
        """Each pair's row of what there is one of a token, [c, D]."""
        return source_MD.index_select(0, self.order_R[chunk.pairs] // self.position_Mk.shape[1])

    def scores(self, chunk: Chunk) -> Tensor:
        """Each pair's, [c]."""
        return self.scores_Mk.flatten()[self.order_R[chunk.pairs]]

    def forward(self, x_cK: Tensor, part: int, chunk: Chunk) -> Tensor:
        """x W^T + b of one of the three projections, [c, N]."""
        y_cN = self.weights[part].product(x_cK, chunk)
        return y_cN if self.biases[part] is None else y_cN.add_(self.bias(part, chunk))

    def backward(self, grad_cN: Tensor, part: int, chunk: Chunk) -> Tensor:
        """g W, [c, K]."""
        return grouped_mm(grad_cN, self.weights[part].decoded(chunk.index, grad_cN.dtype), chunk.groups)

    def bias(self, part: int, chunk: Chunk) -> Tensor:
        """Each pair's own, [c, N]."""
        bias_EN = self.biases[part]
        assert bias_EN is not None
        return bias_EN[chunk.index][chunk.group_c].to(self.x_MD.dtype)

    def update(self, index: int, chunk: Chunk) -> Update | None:
        """The chosen experts' part of one."""
        whole = self.updates[index]
        return whole and Update(whole.A[chunk.index], whole.B[chunk.index], whole.scaling)

    def gate_and_up(self, x_cD: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        gate_cJ, up_cJ = self.forward(x_cD, 0, chunk), self.forward(x_cD, 1, chunk)
        if update := self.update(0, chunk):
            update.add_(x_cD, chunk.groups, gate_cJ, up_cJ)
        return gate_cJ, up_cJ

    def down(self, h_cJ: Tensor, chunk: Chunk) -> Tensor:
        y_cD = self.forward(h_cJ, 2, chunk)
        if update := self.update(1, chunk):
            update.add_(h_cJ, chunk.groups, y_cD)
        return y_cD


class _Rows:
    """The rows of all pairs, of which each chunk brings a run."""

    def __init__(self, work: _Work, width: int) -> None:
        self._new, self._shape = work.x_MD.new_empty, (work.pairs, width)
        self._rows: Tensor | None = None

    def put(self, chunk: Chunk, value_cN: Tensor) -> None:
        """Those of a chunk; kept as they are where it has all pairs."""
        if value_cN.shape == self._shape:
            self._rows = value_cN
        else:
            self.all[chunk.pairs] = value_cN

    @property
    def all(self) -> Tensor:
        """[R, N]."""
        if self._rows is None:
            self._rows = self._new(self._shape)
        return self._rows


def _matrix_bytes(weights: ExpertWeights, dtype: torch.dtype) -> int:
    N, K = weights.shape
    return N * K * dtype.itemsize


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, scores_Mk: Tensor, *rest: Any) -> Tensor:
        trained, (made, *tensors) = rest[:4], rest[4:]
        work = _Work.of(x_MD, scores_Mk, trained, made, *tensors)
        J = work.weights[0].shape[0]
        gate, up, y = _Rows(work, J), _Rows(work, J), _Rows(work, x_MD.shape[1])
        for chunk in work.forward_chunks():
            gate_cJ, up_cJ = work.gate_and_up(work.tokens(x_MD, chunk), chunk)
            gate.put(chunk, gate_cJ)
            up.put(chunk, up_cJ)
            y.put(chunk, work.down(glu_forward(made.glu, gate_cJ, up_cJ), chunk))
        ctx.made = made
        ctx.save_for_backward(x_MD, scores_Mk, gate.all, up.all, *trained, *tensors)
        return combine(y.all, work.position_Mk, scores_Mk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Any, ...]:
        x_MD, scores_Mk, gate_RJ, up_RJ, *rest = ctx.saved_tensors
        work = _Work.of(x_MD, scores_Mk, rest[:4], ctx.made, *rest[4:])
        gradients = _Gradients.of(work)
        for chunk in work.chunks():
            _backward_of(work, chunk, gate_RJ[chunk.pairs], up_RJ[chunk.pairs], grad_MD, gradients)
        grad_x = combine(gradients.x.all, work.position_Mk)
        return grad_x, gradients.of_scores(work.position_Mk), *gradients.trained, None, *(None for _ in rest[4:])


class _Gradients(NamedTuple):
    """Where every chunk puts its part: of x and the scores at each pair, and of A and B of both updates."""

    x: _Rows
    scores_R: Tensor
    trained: list[Tensor | None]

    @classmethod
    def of(cls, work: _Work) -> "_Gradients":
        factors = (factor for update in work.updates for factor in (update[:2] if update else (None, None)))
        trained = [None if factor is None else torch.zeros_like(factor) for factor in factors]
        return cls(_Rows(work, work.x_MD.shape[1]), work.scores_Mk.new_zeros(work.pairs), trained)

    def put(self, index: int, chunk: Chunk, value: Tensor) -> None:
        """The gradients of the chosen experts' factor."""
        whole = self.trained[index]
        assert whole is not None
        whole[chunk.index] = value

    def of_scores(self, position_Mk: Tensor) -> Tensor:
        """[M, k]."""
        return F.pad(self.scores_R, (0, 1))[position_Mk]  # place -1 is the 0 at the end


def _backward_of(
    work: _Work, chunk: Chunk, gate_cJ: Tensor, up_cJ: Tensor, grad_MD: Tensor, gradients: _Gradients
) -> None:
    """Of one chunk of experts."""
    scores_c, grad_cD = work.scores(chunk), work.tokens(grad_MD, chunk)
    grad_h_cJ = work.backward(grad_cD, 2, chunk)
    update = work.update(1, chunk)
    if update:
        narrow_cr = grouped_mm(grad_cD, update.B, chunk.groups) * update.scaling
        add_grouped_(grad_h_cJ, narrow_cr, update.A, chunk.groups)
    h_cJ, grad_c2J, dots_c = glu_backward(work.made.glu, gate_cJ, up_cJ, grad_h_cJ, scores_c)
    if update:
        scores_c1 = scores_c[:, None].to(h_cJ.dtype)
        gradients.put(2, chunk, grouped_outer(narrow_cr * scores_c1, h_cJ, chunk.groups))
        gradients.put(3, chunk, grouped_outer(grad_cD, update.narrow(h_cJ, chunk.groups) * scores_c1, chunk.groups))
    if work.biases[2] is not None:
        dots_c = dots_c + (grad_cD.float() * work.bias(2, chunk).float()).sum(1)
    gradients.scores_R[chunk.pairs] = dots_c.to(scores_c.dtype)
    del grad_cD, grad_h_cJ, h_cJ
    gradients.x.put(chunk, _backward_of_gate_and_up(work, chunk, grad_c2J, gradients))


def _backward_of_gate_and_up(work: _Work, chunk: Chunk, grad_c2J: Tensor, gradients: _Gradients) -> Tensor:
    """The gradient [c, D] by the tokens; that of the update goes where it belongs."""
    grad_gate_cJ, grad_up_cJ = grad_c2J.chunk(2, dim=1)
    grad_x_cD = work.backward(grad_gate_cJ, 0, chunk).add_(work.backward(grad_up_cJ, 1, chunk))
    if update := work.update(0, chunk):
        x_cD = work.tokens(work.x_MD, chunk)
        narrow_cr = grouped_mm(grad_c2J, update.B, chunk.groups) * update.scaling
        add_grouped_(grad_x_cD, narrow_cr, update.A, chunk.groups)
        gradients.put(0, chunk, grouped_outer(narrow_cr, x_cD, chunk.groups))
        gradients.put(1, chunk, grouped_outer(grad_c2J, update.narrow(x_cD, chunk.groups), chunk.groups))
    return grad_x_cD
