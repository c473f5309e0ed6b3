"""A step that was given to the device: its figures are read once the next one is on its way."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.checkpoint.host_copies import HostCopies, mark_stream
from qsharded.distributed.world import World
from qsharded.training.gradient import GradientSums
from qsharded.utils import collectives


@dataclass(frozen=True)
class StepResult:
    """An optimizer step, over all ranks.

    Attributes:
        count: what the loss and the metrics are a mean over.
        grad_norm: before clipping.
        metrics: the objective's own, by name.
    """

    loss: float
    count: int
    grad_norm: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunningStep:
    """An optimizer step whose figures may still be computed.

    Attributes:
        number: of steps done, with this one.
        epoch: passes over the data done, with it.
        rate: its learning rate.
        tokens: that are no padding, of all ranks.
        count: what its loss and metrics are a mean over.
    """

    number: int
    epoch: float
    rate: float
    tokens: int
    count: int
    _figures: "_Figures"

    @classmethod
    def queued(
        cls,
        sums: GradientSums,
        grad_norm: Tensor,
        world: World,
        *,
        number: int,
        epoch: float,
        rate: float,
        tokens: int,
        count: int,
    ) -> "RunningStep":
        """The step behind all that the device was given so far. Every rank calls this: it adds up their sums."""
        return cls(number, epoch, rate, tokens, count, _Figures.queued(sums, grad_norm, world))

    def is_done(self) -> bool:
        """Whether its figures can be read without waiting."""
        return self._figures.there is None or self._figures.there.query()

    def result(self) -> StepResult:
        """Its figures, over all ranks; waits for the device to come so far."""
        loss, metrics, grad_norm = self._figures.read()
        return StepResult(
            loss / self.count, self.count, grad_norm, {name: value / self.count for name, value in metrics.items()}
        )


@dataclass(frozen=True)
class _Figures:
    """fp64 in host memory: the loss, the metrics by name, the gradient's norm; there when the event has come."""

    names: list[str]
    values: Tensor
    there: torch.cuda.Event | None

    @classmethod
    def queued(cls, sums: GradientSums, grad_norm: Tensor, world: World) -> "_Figures":
        names = sorted(sums.metrics)
        over_ranks = torch.stack([sums.loss, *(sums.metrics[name] for name in names)])
        collectives.all_reduce(over_ranks, dist.ReduceOp.SUM, world.group)
        on_device = torch.cat([over_ranks, grad_norm.to(over_ranks.dtype)[None]])
        values = HostCopies().copy("step", {"figures": on_device})["figures"]
        return cls(names, values, mark_stream(world.device))

    def read(self) -> tuple[float, Mapping[str, float], float]:
        if self.there is not None:
            self.there.synchronize()
        loss, *metrics, grad_norm = self.values.tolist()
        return loss, dict(zip(self.names, metrics, strict=True)), grad_norm
