"""What training makes small: a sum over a batch, and what the sum of all batches is divided by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from qsharded.data import Batch, Step
from qsharded.models import CausalLM


@dataclass(frozen=True)
class BatchSums:
    """What an objective makes of a batch.

    Attributes:
        loss: [] in fp32, differentiable: the sum of the batch's losses.
        metrics: name -> [] without gradient: sums too, which are logged divided by the objective's count. The names are
            alike on all ranks and in all batches.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What a run trains for. The count stands apart from the sums: the first gradient needs that of all ranks."""

    def __call__(self, model: CausalLM, batch: Batch) -> BatchSums:
        """The sums over a batch of this rank's, which may be padding alone. Every rank calls this at the same time."""
        ...

    def count(self, step: Step) -> int:
        """What the step's losses, of all ranks and micro-batches, are a sum over: at least 1, alike on all ranks."""
        ...


class SupervisedFineTuning:
    """The cross-entropy of the trained tokens."""

    def __call__(self, model: CausalLM, batch: Batch) -> BatchSums:
        """The sum of a batch's token losses."""
        return BatchSums(batch_loss(model, batch))

    def count(self, step: Step) -> int:
        """Supervised tokens."""
        return step.trained_tokens


SUPERVISED = SupervisedFineTuning()
"""What a run trains for unless another objective is given."""


def batch_loss(model: CausalLM, batch: Batch) -> Tensor:
    """The fp32 sum of a batch's token losses."""
    return _call(model, batch, per_token=False)


def batch_log_probs(model: CausalLM, batch: Batch) -> Tensor:
    """The fp32 log-probabilities of a batch's targets, [B, S]; 0 where a token is not trained on."""
    return _call(model, batch, per_token=True)


def _call(model: CausalLM, batch: Batch, *, per_token: bool) -> Tensor:
    result: Tensor = model(
        batch.input_ids,
        positions_BS=batch.positions,
        document_ids_BS=batch.document_ids,
        boundaries=batch.boundaries,
        targets_BS=batch.targets,
        per_token=per_token,
    )
    return result
