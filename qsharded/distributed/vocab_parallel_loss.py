"""Cross-entropy and log-probabilities where each rank holds some of the vocabulary's rows.

A chunk is some tokens of every rank: their hidden states are gathered, each rank computes their logits in its rows of
the vocabulary, and the ranks put their sums together. Axes as in ``vocab_parallel_autograd``; N = W * C.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsharded.distributed.vocab_parallel_autograd import most, padded, precise, summed
from qsharded.models.chunked_loss import LOGITS_PER_CHUNK, capped, softcap_slope
from qsharded.quant.backends import takes_triton
from qsharded.utils import collectives
from qsharded.utils.documents import IGNORE
from qsharded.utils.sharding import RowRange

_ELSEWHERE = -(1 << 62)  # as the kernels have it


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
        RuntimeError: a target of any rank's is outside the vocabulary (on a GPU its loss is NaN).
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
        T, M = hidden_TD.shape[0], most(hidden_TD, rows)
        targets_WM = collectives.all_gather(padded(targets_T, M, IGNORE), rows.group)
        loss = hidden_TD.new_zeros((), dtype=precise(hidden_TD))
        wants_hidden = with_grad and ctx.needs_input_grad[0]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        for start in range(0, M, chunk_size):
            stop = min(start + chunk_size, M)
            own_CD, targets_WC = hidden_TD[start:stop], targets_WM[:, start:stop]
            chunk = _Chunk.of(own_CD, weight_vD, targets_WC, rows, softcap)
            loss_N, log_sum_N = chunk.losses()
            loss += loss_N.view(-1, stop - start)[collectives.rank(rows.group)].sum()
            if grad_hidden_TD is not None:
                grad_WCD = (chunk.gradient(log_sum_N) @ weight_vD).unflatten(0, (-1, stop - start))
                grad_hidden_TD[start:stop] = summed(grad_WCD, rows)[: max(0, T - start)]
            del chunk  # or its logits would live on beside the next chunk's
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
        T, M = hidden_TD.shape[0], most(hidden_TD, rows)
        targets_WM = collectives.all_gather(padded(targets.flatten(), M, IGNORE), rows.group)
        log_probs = hidden_TD.new_empty(targets.shape, dtype=precise(hidden_TD))
        log_probs_T = log_probs.view(-1)
        for start in range(0, M, chunk_size):
            stop = min(start + chunk_size, M)
            own_CD, targets_WC = hidden_TD[start:stop], targets_WM[:, start:stop]
            losses_N, _ = _Chunk.of(own_CD, weight_vD, targets_WC, rows, softcap).losses()
            own_C = losses_N.view(-1, stop - start)[collectives.rank(rows.group)]
            log_probs_T[start:stop] = -own_C[: max(0, T - start)]
        ctx.save_for_backward(hidden_TD, weight_vD, targets_WM)
        ctx.rows, ctx.chunk_size, ctx.softcap = rows, chunk_size, softcap
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_TD, weight_vD, targets_WM), rows = ctx.saved_tensors, ctx.rows
        T, M = hidden_TD.shape[0], targets_WM.shape[1]
        grad_WM = collectives.all_gather(padded(grad.flatten(), M, 0), rows.group)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        for start in range(0, M, ctx.chunk_size):
            stop = min(start + ctx.chunk_size, M)
            own_CD, targets_WC = hidden_TD[start:stop], targets_WM[:, start:stop]
            chunk = _Chunk.of(own_CD, weight_vD, targets_WC, rows, ctx.softcap)
            grad_Nv = chunk.gradient(chunk.losses()[1]).mul_(-grad_WM[:, start:stop].reshape(-1, 1))
            grad_WCD = (grad_Nv @ weight_vD).unflatten(0, (-1, stop - start))
            grad_hidden_TD[start:stop] = summed(grad_WCD, rows)[: max(0, T - start)]
            del chunk, grad_Nv
        return grad_hidden_TD, None, None, None, None, None


@dataclass(frozen=True)
class _Chunk:
    """A chunk's logits in this rank's rows of the vocabulary.

    Attributes:
        columns_N: of the targets in ``logits_Nv``, or ``_ELSEWHERE``.
    """

    logits_Nv: Tensor
    targets_N: Tensor
    columns_N: Tensor
    rows: RowRange
    softcap: float | None

    @classmethod
    def of(
        cls, own_cD: Tensor, weight_vD: Tensor, targets_WC: Tensor, rows: RowRange, softcap: float | None
    ) -> "_Chunk":
        """That of C tokens of every rank, c <= C of them this rank's."""
        hidden_WCD = collectives.all_gather(padded(own_cD, targets_WC.shape[1], 0), rows.group)
        targets_N = targets_WC.flatten()
        return cls(hidden_WCD.flatten(0, 1) @ weight_vD.T, targets_N, _columns(targets_N, rows), rows, softcap)

    def losses(self) -> tuple[Tensor, Tensor]:
        """(the tokens' losses [N]; log(sum exp) [N] over the whole vocabulary)."""
        largest_WN, sums_WN, chosen_WN = collectives.all_gather(self._sums(), self.rows.group).unbind(1)
        largest_N = largest_WN.amax(0)
        log_sum_N = largest_N + (sums_WN * (largest_WN - largest_N).exp()).sum(0).log()
        return (log_sum_N - chosen_WN.sum(0)).masked_fill(self.targets_N == IGNORE, 0.0), log_sum_N

    def _sums(self) -> Tensor:
        """[3, N] of this rank's rows: the largest logit, the sum of exp(logit - largest), the target's logit or 0."""
        if self.rows.count == 0:
            nothing_N = self.logits_Nv.new_zeros(self.targets_N.shape, dtype=precise(self.logits_Nv))
            return torch.stack((nothing_N - torch.inf, nothing_N, nothing_N))
        if self._has_kernels():
            from qsharded_kernels import triton_cross_entropy  # here: Triton loads slowly

            return triton_cross_entropy.sums(self.logits_Nv, self.columns_N, self.softcap)
        capped_Nv = self._capped()
        here_N = self.columns_N != _ELSEWHERE
        chosen_N = capped_Nv.gather(-1, self.columns_N.where(here_N, 0)[:, None])[:, 0].where(here_N, 0.0)
        largest_N = capped_Nv.amax(-1)
        return torch.stack((largest_N, (capped_Nv - largest_N[:, None]).exp_().sum(-1), chosen_N))

    def gradient(self, log_sum_N: Tensor) -> Tensor:
        """Of the sum of the losses by the logits, in their dtype: softmax - one-hot, through the soft-cap; 0 for tokens
        that are not trained on. The logits are used up."""
        trained_N = self.targets_N != IGNORE
        if self.rows.count == 0:
            return self.logits_Nv
        if self._has_kernels():
            from qsharded_kernels import triton_cross_entropy

            triton_cross_entropy.gradient_(self.logits_Nv, self.columns_N, log_sum_N, trained_N, self.softcap)
            return self.logits_Nv
        capped_Nv = self._capped()
        grad_Nv = (capped_Nv - log_sum_N[:, None]).exp_()
        here_N = self.columns_N != _ELSEWHERE
        grad_Nv.scatter_add_(-1, self.columns_N.where(here_N, 0)[:, None], -here_N.to(grad_Nv.dtype)[:, None])
        grad_Nv.masked_fill_(~trained_N[:, None], 0.0)
        if self.softcap is not None:
            grad_Nv *= softcap_slope(capped_Nv, self.softcap)
        return grad_Nv.to(self.logits_Nv.dtype)

    def _capped(self) -> Tensor:
        return capped(self.logits_Nv.to(precise(self.logits_Nv)), self.softcap)

    def _has_kernels(self) -> bool:
        return takes_triton(self.logits_Nv)


def _columns(targets_N: Tensor, rows: RowRange) -> Tensor:
    """Where in this rank's rows the targets are, or ``_ELSEWHERE``. Targets that no rank has count as the outermost
    ranks' own, as in the look-up: there they are refused."""
    here_N = targets_N != IGNORE
    if rows.count == 0:
        here_N = torch.zeros_like(here_N)
    if rows.start > 0:
        here_N &= targets_N >= rows.start
    if rows.stop < rows.total:
        here_N &= targets_N < rows.stop
    return (targets_N - rows.start).where(here_N, _ELSEWHERE)
