"""Embedding, logits, cross-entropy and log-probabilities where each rank holds some of the vocabulary's rows.

Each rank has tokens of its own, in a number of its own. Hidden states travel, weights do not: a token's hidden state is
far smaller than the rows of a 128k vocabulary. Every rank calls these functions together with the others. No weight
gets a gradient.

Axes: W ranks, T this rank's tokens, M the most that a rank has, C tokens of one chunk, D hidden size, V vocabulary,
v this rank's rows of it, R = ceil(V / W) rows of a full share, N = W * C.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from qsharded.models.chunked_loss import LOGITS_PER_CHUNK, capped, softcap_slope
from qsharded.utils import collectives
from qsharded.utils.documents import IGNORE
from qsharded.utils.sharding import RowRange, rows_per_rank

# 2^25 bf16 values are 64 MiB: the rows looked up for all ranks at a time.
_LOOKED_UP_AT_A_TIME = 1 << 25


def lookup(ids_T: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    """The embedding's rows [T, D] of ``ids_T``, on its device. The weight may lie in host memory.

    Args:
        ids_T: int64, each in [0, V).
        weight_vD: the rows of the embedding that this rank holds, as ``rows`` says.

    Raises:
        IndexError: an id of any rank's is outside the vocabulary (on a GPU, a device-side assertion).
    """
    ids_WM = collectives.all_gather(_padded(ids_T, _most(ids_T, rows), 0), rows.group)
    step = max(1, _LOOKED_UP_AT_A_TIME // (ids_WM.shape[0] * weight_vD.shape[1]))
    parts = [_look_up_chunk(ids_WC, weight_vD, rows) for ids_WC in ids_WM.split(step, dim=1)]
    return torch.cat(parts)[: ids_T.shape[0]]


def _look_up_chunk(ids_WC: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    looked_up_WCD = _own_rows_of(ids_WC.to(weight_vD.device), weight_vD, rows).to(ids_WC.device)
    # Of the ranks' rows all but one are zeros, so that their sum as integers is exact, in any dtype.
    whole_CI = collectives.reduce_scatter(looked_up_WCD.view(torch.int32), rows.group)
    return whole_CI.view(weight_vD.dtype)


def _own_rows_of(ids_WC: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    if rows.count == 0:
        return weight_vD.new_zeros(*ids_WC.shape, weight_vD.shape[1])
    # Ids that no rank has count as the outermost ranks' own: there the look-up refuses them.
    elsewhere_WC = torch.zeros_like(ids_WC, dtype=torch.bool)
    if rows.start > 0:
        elsewhere_WC |= ids_WC < rows.start
    if rows.stop < rows.total:
        elsewhere_WC |= ids_WC >= rows.stop
    found_WCD = F.embedding((ids_WC - rows.start).masked_fill(elsewhere_WC, 0), weight_vD)
    return found_WCD.masked_fill_(elsewhere_WC[..., None], 0)


def logits(hidden_TD: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    """``hidden @ weight.T`` over the whole vocabulary, [T, V]. Gradients: hidden."""
    result: Tensor = _Logits.apply(hidden_TD, weight_vD, rows)
    return result


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
        ctx.save_for_backward(weight_vD)
        ctx.rows, ctx.tokens = rows, (hidden_TD.shape[0], _most(hidden_TD, rows))
        T, M = ctx.tokens
        hidden_WMD = collectives.all_gather(_padded(hidden_TD, M, 0), rows.group)
        share = _share(rows)
        parts_WMR = F.pad(hidden_WMD @ weight_vD.T, (0, share - rows.count))
        received_WMR = collectives.all_to_all(parts_WMR, rows.group)
        return received_WMR.transpose(0, 1).flatten(1)[:T, : rows.total].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        (weight_vD,), rows, (T, M) = ctx.saved_tensors, ctx.rows, ctx.tokens
        share, ranks = _share(rows), collectives.size(rows.group)
        grad_MV = _padded(F.pad(grad_TV, (0, share * ranks - rows.total)), M, 0)
        grad_WMR = collectives.all_to_all(grad_MV.unflatten(1, (ranks, share)).transpose(0, 1), rows.group)
        grad_hidden_MD = _summed(grad_WMR[..., : rows.count] @ weight_vD, rows)
        return grad_hidden_MD[:T], None, None


def cross_entropy(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    targets_T: Tensor,
    rows: RowRange,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum over this rank's tokens of -log softmax(hidden @ weight.T)[target], as ``chunked_cross_entropy``.

    A chunk takes ``chunk_size`` tokens of every rank (None: as many as fill 256 MiB of logits).

    Raises:
        RuntimeError: a target of any rank's is outside the vocabulary (on a GPU, a device-side assertion).
    """
    if chunk_size is None:
        chunk_size = max(1, LOGITS_PER_CHUNK // rows.total)
    with_grad = torch.is_grad_enabled()
    loss: Tensor = _CrossEntropy.apply(hidden_TD, weight_vD, targets_T, rows, chunk_size, with_grad, softcap)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The gradient is computed in the same pass, so that no more than one chunk of logits ever exists."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        targets_T: Tensor,
        rows: RowRange,
        chunk_size: int,
        with_grad: bool,
        softcap: float | None,
    ) -> Tensor:
        T, M = hidden_TD.shape[0], _most(hidden_TD, rows)
        targets_WM = collectives.all_gather(_padded(targets_T, M, IGNORE), rows.group)
        loss = hidden_TD.new_zeros((), dtype=_precise(hidden_TD))
        wants_hidden = with_grad and ctx.needs_input_grad[0]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        for start in range(0, M, chunk_size):
            stop = min(start + chunk_size, M)
            own_CD, targets_WC = hidden_TD[start:stop], targets_WM[:, start:stop]
            chunk, loss_N, softmax_Nv = _chunk_losses(own_CD, weight_vD, targets_WC, rows, softcap)
            loss += loss_N.view(-1, stop - start)[collectives.rank(rows.group)].sum()
            if grad_hidden_TD is not None:
                grad_Nv = chunk.gradient(softmax_Nv).to(hidden_TD.dtype)
                grad_WCD = (grad_Nv @ weight_vD).unflatten(0, (-1, stop - start))
                grad_hidden_TD[start:stop] = _summed(grad_WCD, rows)[: max(0, T - start)]
                del grad_Nv
            del chunk, softmax_Nv  # or it would live on beside the next chunk's logits
        ctx.save_for_backward(grad_hidden_TD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden_TD,) = ctx.saved_tensors
        grad = None if grad_hidden_TD is None else grad_hidden_TD * grad_loss
        return grad, None, None, None, None, None, None


def log_probs(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    targets: Tensor,
    rows: RowRange,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each of this rank's tokens, as ``chunked_log_probs``.

    Chunks and errors as in :func:`cross_entropy`. Every rank calls the backward too, which computes the logits again.
    """
    if chunk_size is None:
        chunk_size = max(1, LOGITS_PER_CHUNK // rows.total)
    result: Tensor = _LogProbs.apply(hidden_TD, weight_vD, targets, rows, chunk_size, softcap)
    return result


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        targets: Tensor,
        rows: RowRange,
        chunk_size: int,
        softcap: float | None,
    ) -> Tensor:
        T, M = hidden_TD.shape[0], _most(hidden_TD, rows)
        targets_WM = collectives.all_gather(_padded(targets.flatten(), M, IGNORE), rows.group)
        log_probs = hidden_TD.new_empty(targets.shape, dtype=_precise(hidden_TD))
        log_probs_T = log_probs.view(-1)
        for start in range(0, M, chunk_size):
            stop = min(start + chunk_size, M)
            own_CD, targets_WC = hidden_TD[start:stop], targets_WM[:, start:stop]
            chunk, losses_N, softmax_Nv = _chunk_losses(own_CD, weight_vD, targets_WC, rows, softcap)
            own_C = losses_N.view(-1, stop - start)[collectives.rank(rows.group)]
            log_probs_T[start:stop] = -own_C[: max(0, T - start)]
            del chunk, softmax_Nv
        ctx.save_for_backward(hidden_TD, weight_vD, targets_WM)
        ctx.rows, ctx.chunk_size, ctx.softcap = rows, chunk_size, softcap
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_TD, weight_vD, targets_WM), rows = ctx.saved_tensors, ctx.rows
        T, M = hidden_TD.shape[0], targets_WM.shape[1]
        grad_WM = collectives.all_gather(_padded(grad.flatten(), M, 0), rows.group)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        for start in range(0, M, ctx.chunk_size):
            stop = min(start + ctx.chunk_size, M)
            own_CD, targets_WC = hidden_TD[start:stop], targets_WM[:, start:stop]
            chunk, _, softmax_Nv = _chunk_losses(own_CD, weight_vD, targets_WC, rows, ctx.softcap)
            grad_Nv = chunk.gradient(softmax_Nv).mul_(-grad_WM[:, start:stop].reshape(-1, 1)).to(hidden_TD.dtype)
            grad_WCD = (grad_Nv @ weight_vD).unflatten(0, (-1, stop - start))
            grad_hidden_TD[start:stop] = _summed(grad_WCD, rows)[: max(0, T - start)]
            del chunk, grad_Nv, softmax_Nv
        return grad_hidden_TD, None, None, None, None, None


def _chunk_losses(
    own_cD: Tensor, weight_vD: Tensor, targets_WC: Tensor, rows: RowRange, softcap: float | None
) -> tuple["_Chunk", Tensor, Tensor]:
    """A chunk of C tokens of every rank, c <= C of them this rank's; with its losses [N] and softmax [N, v]."""
    own_CD = _padded(own_cD, targets_WC.shape[1], 0)
    hidden_ND = collectives.all_gather(own_CD, rows.group).flatten(0, 1)
    logits_Nv = capped((hidden_ND @ weight_vD.T).to(_precise(own_cD)), softcap)
    slope_Nv = None if softcap is None else softcap_slope(logits_Nv, softcap)
    chunk = _Chunk(targets_WC.flatten(), rows, slope_Nv)
    return chunk, *chunk.losses_and_softmax_(logits_Nv)


@dataclass(frozen=True)
class _Chunk:
    """The targets of a chunk's tokens, and which of them lie in this rank's rows of the vocabulary.

    Attributes:
        slope_Nv: of the soft-cap at each logit, if there is one.
    """

    targets_N: Tensor
    rows: RowRange
    slope_Nv: Tensor | None = None

    def losses_and_softmax_(self, logits_Nv: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' losses, and this rank's columns of their softmax, in the logits' memory."""
        largest_N = logits_Nv.amax(-1) if self.rows.count else logits_Nv.new_full(self.targets_N.shape, -torch.inf)
        collectives.all_reduce(largest_N, dist.ReduceOp.MAX, self.rows.group)
        logits_Nv -= largest_N[:, None]
        chosen_N = self._of_target(logits_Nv)
        exp_Nv = logits_Nv.exp_()
        sums_2N = torch.stack((exp_Nv.sum(-1), chosen_N))
        sum_N, chosen_N = collectives.all_reduce(sums_2N, dist.ReduceOp.SUM, self.rows.group)
        loss_N = (sum_N.log() - chosen_N).masked_fill(self.targets_N == IGNORE, 0.0)
        return loss_N, exp_Nv.div_(sum_N[:, None])

    def gradient(self, softmax_Nv: Tensor) -> Tensor:
        """softmax - one-hot, in place, through the soft-cap; 0 for tokens that are not trained on."""
        if self.rows.count:
            here_N = self._is_here().to(softmax_Nv.dtype)
            softmax_Nv.scatter_add_(-1, self._column()[:, None], -here_N[:, None])
        softmax_Nv.masked_fill_((self.targets_N == IGNORE)[:, None], 0.0)
        return softmax_Nv if self.slope_Nv is None else softmax_Nv.mul_(self.slope_Nv)

    def _of_target(self, logits_Nv: Tensor) -> Tensor:
        """Each token's logit of its target; 0 where another rank has it."""
        if self.rows.count == 0:
            return logits_Nv.new_zeros(self.targets_N.shape)
        return logits_Nv.gather(-1, self._column()[:, None])[:, 0].where(self._is_here(), 0.0)

    def _is_here(self) -> Tensor:
        # Targets that no rank has count as the outermost ranks' own, as in the look-up: there the gather refuses them.
        here_N = self.targets_N != IGNORE
        if self.rows.start > 0:
            here_N &= self.targets_N >= self.rows.start
        if self.rows.stop < self.rows.total:
            here_N &= self.targets_N < self.rows.stop
        return here_N

    def _column(self) -> Tensor:
        return (self.targets_N - self.rows.start).where(self._is_here(), 0)


def _most(own_T: Tensor, rows: RowRange) -> int:
    return collectives.largest(own_T.shape[0], own_T.device, rows.group)


def _share(rows: RowRange) -> int:
    return rows_per_rank(rows.total, collectives.size(rows.group))


def _padded(own_T: Tensor, length: int, value: int) -> Tensor:
    """``own_T`` [T, ...] with rows of ``value`` behind it up to ``length``."""
    missing = length - own_T.shape[0]
    return torch.cat((own_T, own_T.new_full((missing, *own_T.shape[1:]), value))) if missing else own_T


def _summed(parts_WCD: Tensor, rows: RowRange) -> Tensor:
    """This rank's [C, D] of the sum of the ranks' parts, added in fp32."""
    return collectives.reduce_scatter(parts_WCD.to(_precise(parts_WCD)), rows.group).to(parts_WCD.dtype)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
