"""A decoder layer whose MLP is a mixture of experts: its first half as one autograd node, the mixture behind it.

The node puts out the residual stream after attention and the mixture's input. The mixture runs as it is written, with
autograd; where it is computed again, its input is made again by the node's own functions, whose results then serve the
node's backward, too. So nothing of a layer is computed more than twice, and between forward and backward it keeps what
:class:`qsharded.fused.policy.Policy` says.

Axes: B rows, S tokens of a row, M = B S, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qsharded.fused.attention_half import AttentionHalf, AttentionResults, AttentionWeights, there
from qsharded.fused.policy import Policy
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.decoder import DecoderLayer


def mixture_forward(layer: DecoderLayer, x_BSD: Tensor, inputs: AttentionInputs, policy: Policy) -> Tensor:
    """What ``layer`` computes, [B, S, D]."""

    def mlp(y_BSD: Tensor) -> Tensor:
        return layer.added_by_mlp(y_BSD, inputs)

    with policy.present(x_BSD.device):  # once for both halves
        half = _Half(layer, inputs, x_BSD, policy)
        h_BSD, y_BSD = _FusedHalf.apply(x_BSD, half, *half.trained())
        if "gate_up" in policy.kept or not torch.is_grad_enabled():
            added_BSD = mlp(y_BSD)
        else:
            again = _Again(half, mlp, y_BSD)
            del y_BSD
            # by an empty tensor the checkpoint knows whose random numbers to draw again
            added_BSD = checkpoint(again, x_BSD.new_empty(0), use_reentrant=False)
    out_BSD: Tensor = h_BSD + added_BSD
    return out_BSD


class _Again:
    """The mixture on what the half puts out: in the forward on that very tensor, later on one that is made again."""

    def __init__(self, half: "_Half", mlp: Callable[[Tensor], Tensor], y_BSD: Tensor) -> None:
        self._half, self._mlp, self._requires_grad = half, mlp, y_BSD.requires_grad
        self._given: Tensor | None = y_BSD

    def __call__(self, _: Tensor) -> Tensor:
        if self._given is not None:
            given, self._given = self._given, None
            return self._mlp(given)
        with self._half.weights_present():
            return self._mlp(self._half.mlp_input_again().requires_grad_(self._requires_grad))


class _Results(AttentionResults):
    # the mixture has kept or made the norm's output, so that of the norm the rstd alone is missing
    ATTRIBUTES = AttentionResults.ATTRIBUTES | {"h": ("h_MD", "attended", "rstd_M"), "gate_up": ()}


class _Half:
    """A layer's first half from its forward to its backward. Where weights are elsewhere between calls, it lets go of
    them after the forward, and takes them again when it is first needed."""

    def __init__(self, module: DecoderLayer, inputs: AttentionInputs, x_BSD: Tensor, policy: Policy) -> None:
        self._module, self._inputs, self._policy = module, inputs, policy
        self._shape, self._device = x_BSD.shape, x_BSD.device
        self._at_work: AttentionHalf | None = self._with_weights(x_BSD)
        self._results = _Results()
        self._waiting: Any = None

    def trained(self) -> Iterator[Tensor | None]:
        """A and B of each projection in turn."""
        return there(self._at_work).weights.trained()

    def weights_present(self) -> Any:
        """A context in which the layer's modules hold their weights."""
        return self._policy.present(self._device)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """(The residual stream after attention, the MLP's input), [B, S, D]."""
        results = _Results(x_BSD.reshape(-1, self._shape[-1]))
        y_MD = there(self._at_work).mlp_input(results, torch.empty_like(there(results.x_MD)))
        self._results, self._waiting = results.keep(self._policy.kept), self._policy.keep_input(x_BSD)
        if self._policy.weights_present is not None:
            self._at_work = None
        return self._in_rows(there(results.h_MD)), self._in_rows(y_MD)

    @torch.no_grad()
    def mlp_input_again(self) -> Tensor:
        """The MLP's input, while the weights are present."""
        half = self._awake()
        return self._in_rows(half.mlp_input(self._results, torch.empty_like(there(self._results.x_MD))))

    def gradients(
        self, grad_h_BSD: Tensor, grad_y_BSD: Tensor, wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(By the layer's input, by the adapters.) The results are used up."""
        with self.weights_present() if self._at_work is None else nullcontext():
            half = self._awake()
        results, self._results, self._at_work = self._results, _Results(), None
        if results.h_MD is None:  # no backward of the MLP has asked for its input
            half.mlp_input(results, torch.empty_like(there(results.x_MD)))
        by_stream = (grad.reshape(-1, self._shape[-1]) for grad in (grad_y_BSD, grad_h_BSD))
        grad_h_MD = half.gradient_of_stream(results, *by_stream)
        grad_x_MD, trained = half.attention_gradients(results, grad_h_MD, wants_x)
        return None if grad_x_MD is None else grad_x_MD.view(self._shape), trained

    def _awake(self) -> AttentionHalf:
        """The half with its weights, and its input among the results."""
        if self._results.x_MD is None:
            self._results.x_MD, self._waiting = self._waiting.take().reshape(-1, self._shape[-1]), None
        if self._at_work is None:
            self._at_work = self._with_weights(there(self._results.x_MD).view(self._shape))
        return self._at_work

    def _with_weights(self, x_BSD: Tensor) -> AttentionHalf:
        return AttentionHalf(AttentionWeights.of(self._module, x_BSD, self._shape, self._inputs), self._shape)

    def _in_rows(self, x_MD: Tensor) -> Tensor:
        # no view to autograd, which would forbid what it does in place
        made: Tensor = torch.ops.aten._unsafe_view(x_MD, self._shape)
        return made


class _FusedHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, half: _Half, *trained: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.half = half
        return half.forward(x_BSD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h_BSD: Tensor, grad_y_BSD: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_BSD, trained = ctx.half.gradients(grad_h_BSD, grad_y_BSD, ctx.needs_input_grad[0])
        ctx.half = None
        return grad_x_BSD, None, *trained
