"""What a run reports: metrics.jsonl, and on standard output a progress bar (on a terminal) or plain lines."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from qsharded.report.run_files import SAMPLES_FILE
from qsharded.training.row_file import RowFile
from qsharded.training.trackers import Trackers
from qsharded.utils.progress_bar import ProgressBar


@dataclass(frozen=True)
class TrainRow:
    """One log line of training. `memory_gib` is the rank's peak, `skipped_steps` the run's count so far, `metrics` the
    objective's own, which are written beside the others."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    memory_gib: float
    skipped_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class MetricsLog:
    """Writes the run's metrics; where `is_main` is false every method does nothing.

    A run that resumes passes `first_step`, the steps already done: rows of later steps, which the interrupted run
    left in the file, are dropped, since those steps are run again. The file is written anew where it is 0. Each row
    says how many `seconds` the run has taken since it began to train, its earlier starts included. `trackers` are told
    all of it too.
    """

    def __init__(
        self,
        path: Path | str,
        total_steps: int,
        is_main: bool,
        *,
        first_step: int = 0,
        trackers: Trackers | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_main, self._clock, self._trackers = is_main, clock, trackers
        self._screen = _Screen(stream or sys.stdout, total_steps, first_step)
        self._progress = _Progress(total_steps, first_step, clock)
        self._status = ""
        self._file = RowFile(Path(path), first_step, self.message) if is_main else None
        self._open_samples = partial(RowFile, Path(path).with_name(SAMPLES_FILE), first_step, self.message)
        has_samples = is_main and Path(path).with_name(SAMPLES_FILE).exists()
        self._samples = self._open_samples() if has_samples else None
        self._begun = clock() - (self._file.kept[-1].get("seconds", 0) if self._file and self._file.kept else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Say that `step` steps are done: redraws the bar of a terminal."""
        if self._is_main:
            self._screen.reach(step, self._status)

    def train(self, row: TrainRow) -> None:
        """Log a row of training."""
        if not self._is_main:
            return
        values = asdict(row)
        self._write(values | values.pop("metrics"))
        self._status = _status(row, grad=False)
        self.advance(row.step)
        if not self._screen.is_terminal:
            self._screen.line(f"{self._progress.count(row.step)} {_status(row)} eta {self._progress.eta(row.step)}")

    def evaluation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Log what an evaluation measured, such as `eval_loss` and `eval_perplexity`, under these names."""
        if not self._is_main:
            return
        self._write({"step": step, "epoch": epoch, **values})
        self._screen.line(f"{self._progress.count(step)} " + " ".join(f"{key} {_brief(values[key])}" for key in values))

    def sample(self, step: int, prompt: str, answer: str, reference: str | None = None) -> None:
        """Write what the model answers at this step into samples.jsonl, beside the metrics; nothing is printed."""
        if not self._is_main:
            return
        if self._trackers:
            self._trackers.sample(step, prompt, answer)
        if self._samples is None:
            self._samples = self._open_samples()
        row = {"step": step, "prompt": prompt, "answer": answer}
        self._samples.add(row if reference is None else row | {"reference": reference})

    def refuse_displaced(self) -> None:
        """Raise Displaced where the file is no longer where it was opened: its folder was moved or deleted."""
        if self._file:
            self._file.refuse_displaced()

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_main:
            self._screen.line(text)

    def close(self) -> None:
        """Close the files and leave the bar on a line of its own."""
        self._screen.close()
        for file in filter(None, (self._file, self._samples)):
            file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        if self._trackers:
            self._trackers.log(row["step"], row)
        self._file.add({**row, "seconds": round(self._clock() - self._begun, 1)})


class _Screen:
    """Lines on a stream, above a bar of the steps if the stream is a terminal."""

    def __init__(self, stream: TextIO, total_steps: int, first_step: int) -> None:
        self._stream = stream
        self._bar = ProgressBar("", total_steps, " steps", done=first_step, stays=True, speed=False, stream=stream)
        self.is_terminal = self._bar.is_terminal

    def reach(self, step: int, status: str) -> None:
        if self.is_terminal:
            self._bar.reach(step, status)

    def line(self, text: str) -> None:
        """Print, whatever becomes of the reader: `train | head` must not end the training."""
        try:
            self._bar.message(text)
        except BrokenPipeError:
            # What is still buffered would raise once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def close(self) -> None:
        self._bar.close()


class _Progress:
    """How far the run is."""

    def __init__(self, total_steps: int, first_step: int, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._first = first_step
        self._clock = clock
        self._start = clock()

    def count(self, step: int) -> str:
        return f"step {str(step).rjust(len(str(self._total)))}/{self._total}"

    def eta(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "?"
        return tqdm.format_interval((self._clock() - self._start) / done * (self._total - step))


def _status(row: TrainRow, *, grad: bool = True) -> str:
    """A row in short; ``grad``: with the gradient's norm, for which a bar in 80 columns has no room."""
    figures = (
        f"loss {_brief(row.loss)} {f'grad {_brief(row.grad_norm)} ' if grad else ''}lr {row.learning_rate:.2e} "
        f"tok/s {row.tokens_per_second:.0f} mem {row.memory_gib:.1f}G"
    )
    return figures + (f" skipped {row.skipped_steps}" if row.skipped_steps else "")


def _brief(value: float) -> str:
    return f"{value:.4g}"
