"""What happened since the last log line, and the line that is made of it."""

import time

import torch

from qsharded.checkpoint.resume import Progress
from qsharded.training.metrics import TrainRow
from qsharded.training.running_step import RunningStep, StepResult

_METRIC = "metric: "  # before the names of an objective's own


class LogWindow:
    """Sums since the last log line; they are part of the progress, so a resumed run logs the same figures."""

    def __init__(self, progress: Progress) -> None:
        self._sums = progress.window
        self._seconds, self._tokens = 0.0, 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened since the last step is no training: it does not count in the speed."""
        self._since = time.perf_counter()

    def add(self, result: StepResult, tokens: int) -> None:
        """Count a step of so many tokens that has just been found done."""
        self._sums["loss"] = self._sums.get("loss", 0.0) + result.loss * result.count
        self._sums["count"] = self._sums.get("count", 0) + result.count
        for name, value in result.metrics.items():
            self._sums[_METRIC + name] = self._sums.get(_METRIC + name, 0.0) + value * result.count
        now = time.perf_counter()
        self._tokens += tokens
        self._seconds += now - self._since
        self._since = now

    def close(self, last: RunningStep, grad_norm: float, skipped_steps: int, device: torch.device) -> TrainRow:
        """The log line of this window, whose ``last`` step had a gradient of that norm; the next window begins."""
        row = TrainRow(
            step=last.number,
            epoch=last.epoch,
            loss=self._sums["loss"] / self._sums["count"],
            grad_norm=grad_norm,
            learning_rate=last.rate,
            tokens_per_second=self._tokens / self._seconds,
            memory_gib=peak_memory_gib(device),
            skipped_steps=skipped_steps,
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
