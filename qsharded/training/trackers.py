"""``--report-to``: what is logged also goes to TensorBoard, Weights & Biases or MLflow, whose failures are warnings.

Each has a thread of its own, so that a slow network or file system costs the training nothing; what has not gone out a
while after the end is given up. Their packages are optional, and are imported when they are asked for.
"""

import importlib.util
import math
import os
import queue
import re
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from qsharded.config import TrainConfig, write_toml
from qsharded.report.run_files import RECORD_FILE, TENSORBOARD_FOLDER
from qsharded.report.shareable import all_settings
from qsharded.utils.untrusted_json import read_json

_PATIENCE_S = 15.0  # for all of them together, of the 25 s in which a stopped run is to be saved
_PROJECT = "qsharded"
_NAMED_CHARACTERS = 60  # of a prompt


class Tracker(Protocol):
    """One of them, opened."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, all finite."""

    def text(self, step: int, name: str, text: str) -> None:
        """What the model has answered."""

    def close(self) -> None:
        """Send what still waits."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run. ``id`` stays when the run is gone on with, from ``first_step``."""

    id: str
    name: str
    folder: Path
    first_step: int
    settings: Mapping[str, Any]


class TensorBoard:
    """Event files in the output folder; steps that are run again replace what was there of them."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.first_step + 1 if run.first_step else None
        self._writer = SummaryWriter(str(run.folder / TENSORBOARD_FOLDER), purge_step=purge)
        self._writer.add_text("settings", "\n".join(f"- {key}: {value}" for key, value in run.settings.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, as its environment variables say; the project is qsharded without WANDB_PROJECT."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        settings = dict(run.settings)
        where = {"project": project, "name": run.name, "dir": str(run.folder)}
        self._run = wandb.init(**where, id=run.id, resume="allow", config=settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, as its environment variables say; the experiment is qsharded without MLFLOW_EXPERIMENT_NAME."""

    _TAG = "qsharded.id"

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        filter_string = f"tags.`{self._TAG}` = '{run.id}'"
        found = mlflow.search_runs(filter_string=filter_string, output_format="list") if run.first_step else []
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.name, tags={self._TAG: run.id})
            mlflow.log_params(dict(run.settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._mlflow.log_text(text, f"{re.sub('[^A-Za-z0-9]+', '-', name)}/step-{step:06d}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


_KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def refuse_missing(names: list[str]) -> None:
    """Raise ValueError where the package of one is not installed: before a run that cost something."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report-to {name} needs its package: pip install 'qsharded[{name}]'")


class Trackers:
    """Those of ``--report-to``; none where ``is_main`` is false. Leaving the context closes them."""

    def __init__(self, config: TrainConfig, is_main: bool, first_step: int) -> None:
        names = config.report_to if is_main else []
        run = _tracked(config, first_step) if names else None
        self._workers = [_Worker(name, run) for name in names if run is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.put(None)
        for worker in self._workers:
            worker.wait(_PATIENCE_S / len(self._workers))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass a row on; figures that are not finite are left out."""
        finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for worker in self._workers:
            worker.put(lambda tracker: tracker.log(step, finite))

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """Pass on what the model answers, each prompt's answers under a name of their own."""
        name = f"sample: {prompt[:_NAMED_CHARACTERS]}"
        for worker in self._workers:
            worker.put(lambda tracker: tracker.text(step, name, f"{prompt}\n\n{answer}"))


class _Worker:
    """A tracker's thread."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run, self._has_warned = name, run, False
        self._jobs: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"report to {name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Tracker], None] | None) -> None:
        self._jobs.put(job)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn("it has not taken all within the time that the run's end leaves")

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = _KINDS[self._name](self._run)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}; nothing goes there")
        while (job := self._jobs.get()) is not None:
            if tracker is not None:
                self._try(job, tracker)
        if tracker is not None:
            self._try(lambda opened: opened.close(), tracker)

    def _try(self, job: Callable[[Tracker], None], tracker: Tracker) -> None:
        try:
            job(tracker)
        except Exception as error:  # the next one may go out again
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            print(f"warning: --report-to {self._name}: {why}. The run goes on", file=sys.stderr, flush=True)
        self._has_warned = True


def _tracked(config: TrainConfig, first_step: int) -> TrackedRun:
    folder = Path(config.output_dir)
    settings = all_settings(tomllib.loads(write_toml(config)))
    return TrackedRun(read_json(folder / RECORD_FILE)["id"], folder.resolve().name, folder, first_step, settings)
