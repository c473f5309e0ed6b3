"""What a run reports: metrics.jsonl, and on standard output a progress bar (on a terminal) or plain lines."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from qsharded.report.run_files import SAMPLES_FILE
from qsharded.training.row_file import RowFile


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
    says how many `seconds` the run has taken since it began to train, its earlier starts included.
    """

    def __init__(
        self,
        path: Path | str,
        total_steps: int,
        is_main: bool,
        *,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_main, self._clock = is_main, clock
        self._screen = _Screen(stream or sys.stdout)
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
            self._screen.draw(lambda columns: self._progress.bar(step, self._status, columns))

    def train(self, row: TrainRow) -> None:
        """Log a row of training."""
        if not self._is_main:
            return
        values = asdict(row)
        self._write(values | values.pop("metrics"))
        self._status = _status(row)
        self.advance(row.step)
        if not self._screen.is_terminal:
            self._screen.line(f"{self._progress.count(row.step)} {self._status} eta {self._progress.eta(row.step)}")

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
        self._screen.release()
        for file in filter(None, (self._file, self._samples)):
            file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.add({**row, "seconds": round(self._clock() - self._begun, 1)})


class _Screen:
    """Lines on a stream, with a last line that is redrawn if the stream is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar = ""
        self.is_terminal = stream.isatty()

    def draw(self, render: Callable[[int], str]) -> None:
        if not self.is_terminal:
            return
        # The last column stays free: a terminal wraps when it is filled.
        columns = max(shutil.get_terminal_size().columns - 1, 1)
        bar = render(columns)[:columns]
        self._put("\r" + bar.ljust(min(len(self._bar), columns)))
        self._bar = bar

    def line(self, text: str) -> None:
        over = "\r" + " " * len(self._bar) + "\r" if self._bar else ""
        self._put(f"{over}{text}\n{self._bar}")

    def release(self) -> None:
        if self._bar:
            self._put("\n")
            self._bar = ""

    def _put(self, text: str) -> None:
        """Write, whatever becomes of the reader: `train | head` must not end the training."""
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError:
            # What is still buffered would raise once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


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
        return _duration((self._clock() - self._start) / done * (self._total - step)) if done > 0 else "?"

    def bar(self, step: int, status: str, columns: int) -> str:
        """The bar, drawn in what the figures leave of a line; a narrow terminal gets the figures alone."""
        figures = " ".join(filter(None, [self.count(step), status, f"eta {self.eta(step)}"]))
        room = min(columns - len(figures) - 3, 30)
        if room < 8:
            return figures
        filled = room * step // max(self._total, 1)
        return f"[{'#' * filled}{'.' * (room - filled)}] {figures}"


def _status(row: TrainRow) -> str:
    figures = (
        f"loss {_brief(row.loss)} grad {_brief(row.grad_norm)} lr {row.learning_rate:.2e} "
        f"tok/s {row.tokens_per_second:.0f} mem {row.memory_gib:.1f}G"
    )
    return figures + (f" skipped {row.skipped_steps}" if row.skipped_steps else "")


def _brief(value: float) -> str:
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
