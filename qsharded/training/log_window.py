"""What happened since the last log line, and the line that is made of it."""

import torch

from qsharded.checkpoint.resume import Progress
from qsharded.data import Step
from qsharded.training.metrics import TrainRow


class LogWindow:
    """Sums since the last log line; they are part of the progress, so a resumed run logs the same figures."""

    def __init__(self, progress: Progress) -> None:
        self._sums = progress.window
        self._seconds, self._tokens = 0.0, 0

    def add(self, loss: float, step: Step, seconds: float) -> None:
        """Count a step that took so many seconds, with its loss a supervised token."""
        self._sums["loss"] = self._sums.get("loss", 0.0) + loss * step.supervised_tokens
        self._sums["supervised"] = self._sums.get("supervised", 0) + step.supervised_tokens
        self._tokens += step.tokens
        self._seconds += seconds

    def close(self, progress: Progress, epoch: float, grad_norm: float, rate: float, device: torch.device) -> TrainRow:
        """The log line of this window; the next begins. The norm is the last step's, before clipping."""
        row = TrainRow(
            step=progress.step,
            epoch=epoch,
            loss=self._sums["loss"] / self._sums["supervised"],
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens_per_second=self._tokens / self._seconds,
            memory_gib=peak_memory_gib(device),
            skipped_steps=progress.skipped_steps,
        )
        self._sums.clear()
        self._seconds, self._tokens = 0.0, 0
        return row


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held: GPU memory reserved by PyTorch, or on the CPU its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
