"""The gated MLPs of a layer's experts as one autograd node: tokens in, their experts' weighted sum out.

Only experts that got tokens are dequantized, and of these, one projection of as many as fit ``DECODED_BYTES`` at once.
The backward decodes again. What waits for it is narrow: the tokens [M, D] as they came, and gate and up [R, J] of each
pair; neither the tokens sorted by expert nor the experts' outputs [R, D] do. All else that is [R, D] lives once, since
every chunk of experts writes its pairs where they belong. No two pairs share a place, and a token's k outputs are added
in the order of its choices, so that the result does not depend on which chunk or thread was first.

A pair's weight ("score") comes from the router, so its gradient is needed: <g, y> for the token's output gradient g and
the expert's output y. As y = W h + b + s B A h, that is <W^T g + s A^T B^T g, h> + <g, b>: y is not computed again.

Axes: M tokens, k experts a token, E experts, R pairs, c pairs of a chunk, D hidden size, J the experts' intermediate
size, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsharded.quant.experts import ExpertWeights
from qsharded.quant.grouped import grouped_mm, grouped_outer
from qsharded.quant.routing import Chunk, Routed

DECODED_BYTES = 256 << 20
"""The most that one projection's dequantized experts take at a time; one expert is always decoded whole."""

Glu = Callable[[Tensor, Tensor], Tensor]
"""From gate and up [.., J] to what the down projection takes."""


class Update(NamedTuple):
    """Low-rank updates of one or two projections of all experts that share their input: W_e + scaling * B_e A_e.

    Attributes:
        A: [E, r, K].
        B: [E, N, r]; of gate and up, gate's rows before up's.
    """

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class ExpertMLP:
    """What the experts of a layer compute with: frozen matrices and biases [E, N].

    Attributes:
        gate, up: [J, D] of each expert.
        down: [D, J] of each.
    """

    gate: ExpertWeights
    up: ExpertWeights
    down: ExpertWeights
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    glu: Glu


@torch.compiler.disable  # the counts of tokens are read on the host
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
    scalings = tuple(update.scaling if update else 0.0 for update in (update_in, update_out))
    made = _Made(tuple((part.maker, len(part.tensors)) for part in weights), mlp.glu, scalings, routed)
    out: Tensor = _Experts.apply(x_MD, scores_Mk, *trained, made, routed.order_R, *mlp.biases, *frozen)
    return out


class _Made(NamedTuple):
    """What of the product is no tensor."""

    makers: tuple[tuple[Callable[..., ExpertWeights], int], ...]
    glu: Glu
    scalings: tuple[float, ...]
    routed: Routed  # its counts; the order of pairs is saved as a tensor


@dataclass
class _Work:
    """The tensors of a forward or a backward, and the steps that both take."""

    x_MD: Tensor
    scores_P: Tensor  # P = M k places
    order_R: Tensor
    updates: tuple[Update | None, Update | None]
    weights: list[ExpertWeights]
    biases: Sequence[Tensor | None]
    made: _Made

    @classmethod
    def of(cls, x_MD: Tensor, scores_Mk: Tensor, trained: Sequence[Tensor | None], made: _Made, *rest: Any) -> "_Work":
        order_R, *biases = rest[:4]
        tensors = iter(rest[4:])
        weights = [make(*(next(tensors) for _ in range(count))) for make, count in made.makers]
        pairs = zip(trained[::2], trained[1::2], made.scalings, strict=True)
        update_in, update_out = (None if A is None or B is None else Update(A, B, scaling) for A, B, scaling in pairs)
        return cls(x_MD, scores_Mk.flatten(), order_R, (update_in, update_out), weights, biases, made)

    def chunks(self) -> list[Chunk]:
        """Of experts that are decoded together."""
        matrix = max(_matrix_bytes(part, self.x_MD.dtype) for part in self.weights)
        return list(self.made.routed.chunks(max(1, DECODED_BYTES // matrix)))

    def forward_chunks(self) -> list[Chunk]:
        """All at once where kernels decode none to memory, as for few tokens of each."""
        routed = self.made.routed
        hit = sum(count > 0 for count in routed.counts)
        if hit and not any(part.are_decoded(routed.pairs / hit, self.x_MD) for part in self.weights):
            return list(routed.chunks(hit))
        return self.chunks()

    def places(self, chunk: Chunk) -> Tensor:
        return self.order_R[chunk.pairs]

    def tokens(self, source_MD: Tensor, places_c: Tensor) -> Tensor:
        """Each pair's row of what there is one of a token, [c, D]."""
        return source_MD.index_select(0, places_c // self.made.routed.per_token)

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
        counts_n = chunk.groups.ends.diff(prepend=chunk.groups.ends.new_zeros(1))
        pairs = chunk.pairs.stop - chunk.pairs.start
        return bias_EN[chunk.index].repeat_interleave(counts_n, 0, output_size=pairs).to(self.x_MD.dtype)

    def update(self, index: int, chunk: Chunk) -> Update | None:
        """The chosen experts' part of one."""
        whole = self.updates[index]
        return whole and Update(whole.A[chunk.index], whole.B[chunk.index], whole.scaling)

    def gate_and_up(self, x_cD: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        gate_cJ, up_cJ = self.forward(x_cD, 0, chunk), self.forward(x_cD, 1, chunk)
        if update := self.update(0, chunk):
            narrow_cr = _narrow(x_cD, update, chunk)
            for y_cJ, B in zip((gate_cJ, up_cJ), update.B.chunk(2, dim=1), strict=True):
                y_cJ += grouped_mm(narrow_cr, B.transpose(1, 2), chunk.groups)
        return gate_cJ, up_cJ

    def down(self, h_cJ: Tensor, chunk: Chunk) -> Tensor:
        y_cD = self.forward(h_cJ, 2, chunk)
        if update := self.update(1, chunk):
            y_cD += grouped_mm(_narrow(h_cJ, update, chunk), update.B.transpose(1, 2), chunk.groups)
        return y_cD

    def of_tokens(self, like_PD: Tensor) -> Tensor:
        """The sum of what is at a token's k places, [M, D]."""
        return like_PD.unflatten(0, (-1, self.made.routed.per_token)).sum(1)

    def at_places(self, width: int) -> Tensor:
        """Room for each of the M k places; those of padding stay 0."""
        return self.x_MD.new_zeros(self.scores_P.shape[0], width)


def _matrix_bytes(weights: ExpertWeights, dtype: torch.dtype) -> int:
    N, K = weights.shape
    return N * K * dtype.itemsize


def _narrow(x_cK: Tensor, update: Update, chunk: Chunk) -> Tensor:
    """s A x, [c, r]."""
    return grouped_mm(x_cK, update.A.transpose(1, 2), chunk.groups) * update.scaling


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, scores_Mk: Tensor, *rest: Any) -> Tensor:
        trained, (made, *tensors) = rest[:4], rest[4:]
        work = _Work.of(x_MD, scores_Mk, trained, made, *tensors)
        J = work.weights[0].shape[0]
        gate_RJ, up_RJ = (x_MD.new_empty(made.routed.pairs, J) for _ in range(2))
        out_PD = work.at_places(x_MD.shape[1])
        for chunk in work.forward_chunks():
            places_c = work.places(chunk)
            gate_cJ, up_cJ = work.gate_and_up(work.tokens(x_MD, places_c), chunk)
            gate_RJ[chunk.pairs], up_RJ[chunk.pairs] = gate_cJ, up_cJ
            y_cD = work.down(made.glu(gate_cJ, up_cJ), chunk)
            out_PD[places_c] = (y_cD * work.scores_P[places_c, None]).to(out_PD.dtype)
        ctx.made = made._replace(routed=Routed(x_MD.new_empty(0), made.routed.counts, made.routed.per_token))
        ctx.save_for_backward(x_MD, scores_Mk, gate_RJ, up_RJ, *trained, *tensors)
        return work.of_tokens(out_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Any, ...]:
        x_MD, scores_Mk, gate_RJ, up_RJ, *rest = ctx.saved_tensors
        work = _Work.of(x_MD, scores_Mk, rest[:4], ctx.made, *rest[4:])
        gradients = _Gradients.of(work)
        for chunk in work.chunks():
            _backward_of(work, chunk, gate_RJ[chunk.pairs], up_RJ[chunk.pairs], grad_MD, gradients)
        grad_x = work.of_tokens(gradients.x_PD)
        return grad_x, gradients.scores_P.view_as(scores_Mk), *gradients.trained, None, *(None for _ in rest[4:])


class _Gradients(NamedTuple):
    """Where every chunk puts its part: of x at each place, of the scores, and of A and B of both updates."""

    x_PD: Tensor
    scores_P: Tensor
    trained: list[Tensor | None]

    @classmethod
    def of(cls, work: _Work) -> "_Gradients":
        factors = (factor for update in work.updates for factor in (update[:2] if update else (None, None)))
        trained = [None if factor is None else torch.zeros_like(factor) for factor in factors]
        return cls(work.at_places(work.x_MD.shape[1]), torch.zeros_like(work.scores_P), trained)

    def put(self, index: int, chunk: Chunk, value: Tensor) -> None:
        """The gradients of the chosen experts' factor."""
        whole = self.trained[index]
        assert whole is not None
        whole[chunk.index] = value


def _backward_of(
    work: _Work, chunk: Chunk, gate_cJ: Tensor, up_cJ: Tensor, grad_MD: Tensor, gradients: _Gradients
) -> None:
    """Of one chunk of experts."""
    places_c = work.places(chunk)
    scores_c1 = work.scores_P[places_c, None]
    with torch.enable_grad():
        inputs = gate_cJ.detach().requires_grad_(), up_cJ.detach().requires_grad_()
        h_cJ = work.made.glu(*inputs)
    grad_cD = work.tokens(grad_MD, places_c)
    grad_h_cJ = _backward_of_down(work, chunk, h_cJ.detach(), grad_cD, scores_c1, gradients)
    gradients.scores_P[places_c] = _score_gradient(work, chunk, grad_h_cJ, h_cJ.detach(), grad_cD, scores_c1.dtype)
    grad_gate_cJ, grad_up_cJ = torch.autograd.grad(h_cJ, inputs, (grad_h_cJ * scores_c1).to(h_cJ.dtype))
    gradients.x_PD[places_c] = _backward_of_gate_and_up(work, chunk, places_c, grad_gate_cJ, grad_up_cJ, gradients)


def _score_gradient(
    work: _Work, chunk: Chunk, grad_h_cJ: Tensor, h_cJ: Tensor, grad_cD: Tensor, dtype: torch.dtype
) -> Tensor:
    """<g, y> of each pair, summed in fp32."""
    grad_c = (grad_h_cJ.float() * h_cJ.float()).sum(1)
    if work.biases[2] is not None:
        grad_c = grad_c + (grad_cD.float() * work.bias(2, chunk).float()).sum(1)
    return grad_c.to(dtype)


def _backward_of_down(
    work: _Work, chunk: Chunk, h_cJ: Tensor, grad_cD: Tensor, scores_c1: Tensor, gradients: _Gradients
) -> Tensor:
    """The gradient [c, J] by h, before the scores; that of the update goes where it belongs."""
    grad_h_cJ = work.backward(grad_cD, 2, chunk)
    if update := work.update(1, chunk):
        narrow_cr = grouped_mm(grad_cD, update.B, chunk.groups) * update.scaling
        grad_h_cJ += grouped_mm(narrow_cr, update.A, chunk.groups)
        scored_cD = (grad_cD * scores_c1).to(grad_cD.dtype)
        gradients.put(2, chunk, grouped_outer((narrow_cr * scores_c1).to(h_cJ.dtype), h_cJ, chunk.groups))
        gradients.put(3, chunk, grouped_outer(scored_cD, _narrow(h_cJ, update, chunk), chunk.groups))
    return grad_h_cJ


def _backward_of_gate_and_up(
    work: _Work, chunk: Chunk, places_c: Tensor, grad_gate_cJ: Tensor, grad_up_cJ: Tensor, gradients: _Gradients
) -> Tensor:
    """The gradient [c, D] by the tokens; that of the update goes where it belongs."""
    grad_x_cD = work.backward(grad_gate_cJ, 0, chunk).add_(work.backward(grad_up_cJ, 1, chunk))
    if update := work.update(0, chunk):
        x_cD, grad_c2J = work.tokens(work.x_MD, places_c), torch.cat((grad_gate_cJ, grad_up_cJ), dim=1)
        narrow_cr = grouped_mm(grad_c2J, update.B, chunk.groups) * update.scaling
        grad_x_cD += grouped_mm(narrow_cr, update.A, chunk.groups)
        gradients.put(0, chunk, grouped_outer(narrow_cr, x_cD, chunk.groups))
        gradients.put(1, chunk, grouped_outer(grad_c2J, _narrow(x_cD, update, chunk), chunk.groups))
    return grad_x_cD
