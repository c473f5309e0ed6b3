"""Cross-entropy and log-probabilities of a language-model head without its logits.

Axes: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsharded.quant.backends import wanted_backend
from qsharded.utils.documents import IGNORE

LOGITS_PER_CHUNK = 1 << 26
"""In fp32 256 MiB: 523 tokens of a 128k vocabulary, enough rows for the matmuls to run at full speed."""


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), in the logits' dtype; the logits themselves where ``softcap`` is None."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def chunked_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(capped(hidden @ weight.T))[target], a scalar in fp32 (fp64 for fp64 input).

    Works through `chunk_size` tokens at a time (None: as many as fill 256 MiB of logits) and computes the gradients
    in the same pass, so that no more than one chunk of logits ever exists. Targets of -100 count for nothing.
    Gradients: hidden, and weight where it requires one. Not differentiable twice.
    """
    chunk_size = chunk_size or _tokens_per_chunk(weight_VD)
    with_grad = torch.is_grad_enabled()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk_size, with_grad, softcap)
    return loss


def chunked_log_probs(
    hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, chunk_size: int | None = None, softcap: float | None = None
) -> Tensor:
    """log softmax(capped(hidden @ weight.T))[target] of each token, in fp32 (fp64 for fp64 input); 0 where it is -100.

    As :func:`chunked_cross_entropy`, but what is made of the tokens is open, so that the backward computes the logits
    again, chunk by chunk. The targets, T together, may have any shape, which is the result's: a view of it made by the
    caller would lose the hooks that FSDP2 puts on a module's result once it were changed in place.
    """
    chunk_size = chunk_size or _tokens_per_chunk(weight_VD)
    log_probs: Tensor = _ChunkedLogProbs.apply(hidden_TD, weight_VD, targets, chunk_size, softcap)
    return log_probs


def _tokens_per_chunk(weight_VD: Tensor) -> int:
    return max(1, LOGITS_PER_CHUNK // weight_VD.shape[0])


class _InputGradients:
    """Those of hidden states and weight, where they are wanted, from the logits' gradients, chunk by chunk."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, wanted: Sequence[bool], precise: torch.dtype) -> None:
        self._hidden_TD, self._weight_VD = hidden_TD, weight_VD
        self.hidden_TD = torch.empty_like(hidden_TD) if wanted[0] else None
        # Chunks add up in fp32: in bf16 the sum over thousands of tokens would swallow the late ones.
        self.weight_VD = torch.zeros_like(weight_VD, dtype=precise) if wanted[1] else None

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """Take in the gradient of a chunk's logits."""
        if self.hidden_TD is not None:
            torch.mm(grad_CV, self._weight_VD, out=self.hidden_TD[chunk])
        if self.weight_VD is not None:
            self.weight_VD += grad_CV.T @ self._hidden_TD[chunk]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        chunk_size: int,
        with_grad: bool,
        softcap: float | None,
    ) -> Tensor:
        precise = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=hidden_TD.device)
        gradients = _InputGradients(hidden_TD, weight_VD, [with_grad and n for n in ctx.needs_input_grad[:2]], precise)
        for start in range(0, hidden_TD.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden_CD, targets_C = hidden_TD[chunk], targets_T[chunk]
            losses_C, grad_CV = _losses_and_gradient(hidden_CD @ weight_VD.T, targets_C, precise, softcap)
            loss += losses_C.sum()
            gradients.add(chunk, grad_CV)
            del grad_CV  # or it would live on beside the next chunk's logits
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(gradients.hidden_TD, gradients.weight_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD * grad_loss
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, chunk_size: int, softcap: float | None
    ) -> Tensor:
        targets_T = targets.flatten()
        precise = torch.promote_types(hidden_TD.dtype, torch.float32)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T)
        ctx.chunk_size, ctx.precise, ctx.softcap = chunk_size, precise, softcap
        log_probs = torch.empty(targets.shape, dtype=precise, device=hidden_TD.device)
        log_probs_T = log_probs.view(-1)
        for start in range(0, hidden_TD.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_CV = hidden_TD[chunk] @ weight_VD.T
            losses_C, grad_CV = _losses_and_gradient(logits_CV, targets_T[chunk], precise, softcap)
            torch.neg(losses_C, out=log_probs_T[chunk])
            del logits_CV, grad_CV
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_T = grad.flatten()
        hidden_TD, weight_VD, targets_T = ctx.saved_tensors
        gradients = _InputGradients(hidden_TD, weight_VD, ctx.needs_input_grad[:2], ctx.precise)
        for start in range(0, hidden_TD.shape[0], ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits_CV = hidden_TD[chunk] @ weight_VD.T
            _, grad_CV = _losses_and_gradient(logits_CV, targets_T[chunk], ctx.precise, ctx.softcap)
            grad_CV *= -grad_T[chunk, None]
            gradients.add(chunk, grad_CV)
            del logits_CV, grad_CV
        grad_weight_VD = gradients.weight_VD
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return gradients.hidden_TD, grad_weight, None, None, None


def _losses_and_gradient(
    logits_CV: Tensor, targets_C: Tensor, precise: torch.dtype, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """A chunk's losses [C] in ``precise``, and the gradient of their sum by the logits in theirs: softmax - one-hot,
    times what the soft-cap lets through of it. The logits are used up."""
    if logits_CV.is_cuda and precise == torch.float32 and wanted_backend() != "reference":
        from qsharded_kernels import triton_cross_entropy  # here: Triton loads slowly

        return triton_cross_entropy.forward_(logits_CV, targets_C, IGNORE, softcap), logits_CV
    if logits_CV.is_meta:  # for plans: what the kernel allocates
        return logits_CV.new_empty(targets_C.shape, dtype=precise), logits_CV
    trained_C1 = (targets_C != IGNORE)[:, None]
    index_C1 = targets_C[:, None].where(trained_C1, 0)
    capped_CV = capped(logits_CV.to(precise), softcap)
    log_probs_CV = capped_CV.log_softmax(dim=-1)
    chosen_C1 = log_probs_CV.gather(-1, index_C1)
    grad_CV = log_probs_CV.exp_()  # in place: a chunk is hundreds of megabytes
    grad_CV.scatter_add_(-1, index_C1, torch.full_like(chosen_C1, -1.0))
    grad_CV.masked_fill_(~trained_C1, 0.0)
    if softcap is not None:
        grad_CV *= softcap_slope(capped_CV, softcap)
    return -chosen_C1.where(trained_C1, 0.0)[:, 0], grad_CV.to(logits_CV.dtype)


def softcap_slope(capped: Tensor, softcap: float) -> Tensor:
    """How fast capped logits grow with the logits: 1 - tanh^2, of the capped ones."""
    return 1 - (capped / softcap).square()
