"""A step's gradient: added up over micro-batches, then clipped and applied."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qsharded.checkpoint.adapter import trainable
from qsharded.data import Step
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.optim import ScaledOptimizer, clipping_scale
from qsharded.training.objective import SUPERVISED, BatchSums, Objective
from qsharded.utils.seeds import derived_seed
from qsharded.utils.sharding import whole


@dataclass
class GradientSums:
    """This rank's sums over a step's micro-batches, fp64: of its losses, and of each metric."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, sums: BatchSums) -> None:
        """Another micro-batch's."""
        self.loss += sums.loss.detach()
        for name, value in sums.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value.double()


def accumulate_gradient(
    model: CausalLM,
    step: Step,
    world: World,
    *,
    seed: int,
    step_number: int,
    objective: Objective = SUPERVISED,
    before_each: Callable[[], object] = lambda: None,
) -> GradientSums:
    """Add the gradient of the mean loss, over what ``objective`` counts in all ranks and micro-batches.

    What ``before_each``, called before each micro-batch, raises leaves the step unfinished.
    """
    result = GradientSums(torch.zeros((), dtype=torch.float64, device=world.device))
    count = objective.count(step)
    for index, batch in enumerate(step.micro_batches):
        before_each()
        # A resumed run needs no generator state: dropout draws from what it is for.
        torch.manual_seed(derived_seed(seed, step_number, index, world.rank))
        sums = objective(model, batch.to(world.device))
        # FSDP2 averages the gradient over ranks, hence the world's size.
        (sums.loss * (world.size / count)).backward()
        result.add(sums)
    return result


def apply_gradient(model: CausalLM, optimizer: ScaledOptimizer, rate: float, max_norm: float) -> torch.Tensor:
    """Clip and step at the learning rate ``rate``; returns the gradient's norm before clipping, [] on the device.

    Where that is not finite the step changes nothing. It is the norm over all ranks, so all decide alike. 8-bit AdamW
    does not wait for the device here.
    """
    gradients = [parameter.grad for _, parameter in trainable(model) if parameter.grad is not None]
    norm: torch.Tensor = whole(torch.nn.utils.get_total_norm(gradients))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step(grad_scale=clipping_scale(norm, max_norm))
    optimizer.zero_grad()
    return norm


def was_skipped(grad_norm: float) -> bool:
    """Whether a step with a gradient of this norm has changed nothing."""
    return not math.isfinite(grad_norm)
