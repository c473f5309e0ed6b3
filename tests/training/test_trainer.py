"""The training loop: steps whose figures are read late, as on a GPU, and steps that are recorded."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qsharded import train
from qsharded.report.run_files import read_metrics
from qsharded.training.metrics import MetricsLog
from qsharded.training.running_step import RunningStep
from qsharded.training.stopping import Stopping, StopRequested
from tests.training.test_divergence import arguments


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock and on memory."""
    varying = ("tokens_per_second", "memory_gib", "seconds")
    return [{k: v for k, v in row.items() if k not in varying} for row in read_metrics(folder / "metrics.jsonl")]


EVALUATED = ["--eval-split", "0.1", "--eval-steps", "2", "--save-steps", "4", "--logging-steps", "1"]


def test_figures_that_come_late_are_those_that_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(arguments(tmp_path / "at_once", *EVALUATED))
    events: list[str] = []
    queued, result = RunningStep.queued, RunningStep.result

    def noted_queued(*args: Any, number: int, **others: Any) -> RunningStep:
        events.append(f"queue {number}")
        return queued(*args, number=number, **others)

    def noted_result(self: RunningStep) -> Any:
        events.append(f"read {self.number}")
        return result(self)

    monkeypatch.setattr(RunningStep, "is_done", lambda self: False)
    monkeypatch.setattr(RunningStep, "queued", noted_queued)
    monkeypatch.setattr(RunningStep, "result", noted_result)
    train.main(arguments(tmp_path / "late", *EVALUATED))
    # evaluated after 2 and 4, and ended after 6: those are waited for
    assert " ".join(events) == (
        "queue 1 queue 2 read 1 read 2 queue 3 queue 4 read 3 read 4 queue 5 queue 6 read 5 read 6"
    )
    assert rows(tmp_path / "late") == rows(tmp_path / "at_once")
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("late", "at_once")
    ]
    assert adapters[0] == adapters[1]


def test_a_sample_waits_for_the_figures_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("cheer cat\n")
    events: list[str] = []
    log, sample = MetricsLog.train, MetricsLog.sample
    monkeypatch.setattr(RunningStep, "is_done", lambda self: False)
    monkeypatch.setattr(MetricsLog, "train", lambda self, row: (events.append(f"row {row.step}"), log(self, row))[1])
    monkeypatch.setattr(
        MetricsLog,
        "sample",
        lambda self, step, *words: (events.append(f"sample {step}"), sample(self, step, *words))[1],
    )
    options = ["--logging-steps", "1", "--sample-prompts", str(tmp_path / "prompts.txt"), "--sample-steps", "4"]
    train.main(arguments(tmp_path / "out", *options))
    assert events == ["sample 0", "row 1", "row 2", "row 3", "row 4", "sample 4", "row 5", "row 6", "sample 6"]


def test_a_stopped_run_has_read_its_last_complete_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []

    def stop_in_the_fourth(self: Stopping) -> None:
        checks.append(1)
        if len(checks) == 4:
            raise StopRequested(15)

    monkeypatch.setattr(Stopping, "check", stop_in_the_fourth)
    monkeypatch.setattr(RunningStep, "is_done", lambda self: False)
    train.main(arguments(tmp_path, "--logging-steps", "1"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(("steps", "expected"), [("1", [1]), ("3-4", [3, 4])])
def test_a_profile_holds_its_steps(tmp_path: Path, steps: str, expected: list[int]) -> None:
    train.main(arguments(tmp_path, "--profile", steps))
    with gzip.open(tmp_path / "profile" / "rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    recorded = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert recorded == {f"ProfilerStep#{number - 1}" for number in expected}
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_resumed_run_beyond_the_profiled_step_records_nothing(tmp_path: Path) -> None:
    train.main(arguments(tmp_path, "--save-steps", "3"))
    again = ["--resume-from-checkpoint", str(tmp_path / "checkpoints" / "step-000003")]
    train.main(arguments(tmp_path, "--save-steps", "3", "--profile", "2", *again))
    assert not (tmp_path / "profile").exists()
