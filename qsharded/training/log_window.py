"""What happened since the last log line, and the line that is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qsharded.checkpoint.resume import Progress
from qsharded.training.metrics import TrainRow

_METRIC = "metric: "  # before the names of an objective's own


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


class LogWindow:
    """Sums since the last log line; they are part of the progress, so a resumed run logs the same figures."""

    def __init__(self, progress: Progress) -> None:
        self._sums = progress.window
        self._seconds, self._tokens = 0.0, 0

    def add(self, result: StepResult, tokens: int, seconds: float) -> None:
        """Count a step of so many tokens that took so many seconds."""
        self._sums["loss"] = self._sums.get("loss", 0.0) + result.loss * result.count
        self._sums["count"] = self._sums.get("count", 0) + result.count
        for name, value in result.metrics.items():
            self._sums[_METRIC + name] = self._sums.get(_METRIC + name, 0.0) + value * result.count
        self._tokens += tokens
        self._seconds += seconds

    def close(self, progress: Progress, epoch: float, grad_norm: float, rate: float, device: torch.device) -> TrainRow:
        """The log line of this window; the next begins. The norm is the last step's, before clipping."""
        row = TrainRow(
            step=progress.step,
            epoch=epoch,
            loss=self._sums["loss"] / self._sums["count"],
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens_per_second=self._tokens / self._seconds,
            memory_gib=peak_memory_gib(device),
            skipped_steps=progress.skipped_steps,
            metrics=self._metrics(),
        )
        self._sums.clear()
        self._seconds, self._tokens = 0.0, 0
        return row

    def _metrics(self) -> dict[str, float]:
        sums = {key.removeprefix(_METRIC): value for key, value in self._sums.items() if key.startswith(_METRIC)}
        return {name: value / self._sums["count"] for name, value in sums.items()}


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held: GPU memory reserved by PyTorch, or on the CPU its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
