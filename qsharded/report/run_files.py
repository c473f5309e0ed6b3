"""What a run has written to its output folder, read back for people: its record, settings, metrics and samples."""

import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qsharded.config.evaluated import is_better_high
from qsharded.utils.untrusted_json import read_json

RECORD_FILE, METRICS_FILE, SAMPLES_FILE = "run.json", "metrics.jsonl", "samples.jsonl"
SETTINGS_FILE, FINISHED_FILE = "config.toml", "finished.json"
REPORT_FILE, PNG_FILE = "report.html", "report.png"
BEST_FOLDER, BEST_FILE, TENSORBOARD_FOLDER = "best", "best.json", "tensorboard"
Point = tuple[float, float]


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a killed run left unfinished is no row.

    A figure that was not finite, such as the loss of a skipped step, is None.
    """
    finished = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in finished]


@dataclass(frozen=True)
class Run:
    """A run as its files tell of it, at its end or on the way.

    Attributes:
        name: the output folder's.
        record: of run.json; {} where an older version wrote none.
        settings: of config.toml, by the names of the flags without their dashes.
        rows: of metrics.jsonl: those of training have a ``loss``, the others what an evaluation measured.
        samples: of samples.jsonl: ``step``, ``prompt``, ``answer``, and ``reference`` where there is one.
        finished: whether it has reached its end.
        stopped_early: the step at which it ended as ``--early-stopping-patience`` was out.
        best_kept: of best/best.json: ``measure``, ``value`` and ``step`` of the adapter there.
    """

    name: str
    record: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    finished: bool
    stopped_early: int | None = None
    best_kept: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run in ``folder``.

        Raises:
            ValueError: there is none, or a file of it is damaged; it is named.
        """
        for name in (METRICS_FILE, SETTINGS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no run: it has no {name}; give the --output-dir of a run")
        finished = _read_if_there(folder / FINISHED_FILE)
        return cls(
            name=folder.resolve().name,
            record=_read_if_there(folder / RECORD_FILE) or {},
            settings=_settings(folder / SETTINGS_FILE),
            rows=_rows(folder / METRICS_FILE),
            samples=_rows(folder / SAMPLES_FILE) if (folder / SAMPLES_FILE).is_file() else [],
            finished=finished is not None,
            stopped_early=(finished or {}).get("stopped_early"),
            best_kept=_read_if_there(folder / BEST_FOLDER / BEST_FILE),
        )

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The rows of training."""
        return [row for row in self.rows if "loss" in row]

    @property
    def step(self) -> int:
        """Steps done, as far as they were logged."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to make; None where it does not say."""
        return self.record.get("steps")

    @property
    def measured(self) -> list[str]:
        """What evaluations have measured, in the order in which it came."""
        known = {"step", "epoch", "seconds"}
        return list(dict.fromkeys(key for row in self.rows if "loss" not in row for key in row if key not in known))

    def curve(self, key: str) -> list[Point]:
        """(step, value) of each row that has a finite ``key``."""
        return [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), int | float)]

    def last(self, key: str) -> float | None:
        """The newest value, or None."""
        return next((value for _, value in reversed(self.curve(key))), None)

    def best(self, key: str) -> Point | None:
        """(step, value) of the best one: the largest of an accuracy, the smallest of a loss; the base model's, before
        any step, does not count."""
        found = [point for point in self.curve(key) if point[0] > 0]
        chosen = max if is_better_high(key) else min
        return chosen(found, key=lambda point: point[1], default=None)


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise ValueError(f"{path} holds a line that is no row of a run: each has a step")
    return rows
