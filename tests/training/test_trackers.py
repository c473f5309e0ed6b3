"""--report-to: what goes to trackers, that a resumed run goes on there, and that what fails there ends nothing."""

import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qsharded import train
from qsharded.report.run_files import read_metrics
from qsharded.training import trackers
from tests.training.short_runs import short

EACH = ["--logging-steps", "1", "--save-steps", "2"]


def package(name: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    """A package of that name that has these names."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


class FakeRun:
    """What wandb.init returns."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_row_and_a_resumed_run_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, opened = FakeRun(), []
    package("wandb", monkeypatch, init=lambda **given: (opened.append(given), run)[1])
    (tmp_path / "prompts.txt").write_text("cheer cat\ncheer dog\n")
    out = tmp_path / "out"
    sampled = ["--sample-prompts", str(tmp_path / "prompts.txt"), "--report-to", "wandb"]
    train.main(short(out, *EACH, *sampled))
    rows = read_metrics(out / "metrics.jsonl")
    sent = [(step, values["loss"]) for step, values in run.logged if "loss" in values]
    assert sent == [(row["step"], row["loss"]) for row in rows]
    texts = [(step, name) for step, values in run.logged for name in values if name.startswith("sample")]
    assert texts == [(step, f"sample: cheer {animal}") for step in (0, 6) for animal in ("cat", "dog")]
    assert run.finished
    assert str(tmp_path) not in str(opened[0]["config"])
    train.main(short(out, *EACH, *sampled, "--resume-from-checkpoint", str(out / "checkpoints" / "step-000004")))
    assert opened[1]["id"] == opened[0]["id"]
    assert [step for step, values in run.logged if "loss" in values][6:] == [5, 6]


def test_mlflow_gets_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    known: list[Any] = []

    def noted(name: str) -> Any:
        return lambda *args, **given: calls.append((name, *args, given))

    names = ("set_experiment", "start_run", "log_params", "log_metrics", "log_text", "end_run")
    package("mlflow", monkeypatch, search_runs=lambda **_: known, **{name: noted(name) for name in names})
    train.main(short(tmp_path, *EACH, "--report-to", "mlflow"))
    assert [call[0] for call in calls] == ["set_experiment", "start_run", "log_params", *["log_metrics"] * 6, "end_run"]
    assert [call[-1]["step"] for call in calls if call[0] == "log_metrics"] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "learning_rate", "memory_gib"} <= set(calls[3][1])
    known.append(SimpleNamespace(info=SimpleNamespace(run_id="before")))
    del calls[:]
    again = ["--resume-from-checkpoint", str(tmp_path / "checkpoints" / "step-000004")]
    train.main(short(tmp_path, *EACH, "--report-to", "mlflow", *again))
    assert calls[1] == ("start_run", {"run_id": "before"})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_steps_run_again_replace_the_first_ones(tmp_path: Path) -> None:
    words = [*EACH, "--eval-split", "0.05", "--eval-steps", "3", "--report-to", "tensorboard"]
    train.main(short(tmp_path, *words))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for _ in range(2):
        found = scalars(tmp_path / "tensorboard")
        for name in ("loss", "eval_loss", "learning_rate"):
            expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
            assert found[name] == expected
        train.main(short(tmp_path, *words, "--resume-from-checkpoint", f"{tmp_path}/checkpoints/step-000004"))


def fails(*args: Any, **given: Any) -> Any:
    raise ConnectionError("no network")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_what_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    run = FakeRun()
    if broken != "init":
        monkeypatch.setattr(run, broken, fails)
    package("wandb", monkeypatch, init=fails if broken == "init" else lambda **given: run)
    train.main(short(tmp_path, *EACH, "--report-to", "wandb"))
    assert (tmp_path / "finished.json").is_file()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    rest = "; nothing goes there. The run goes on" if broken == "init" else ". The run goes on"
    assert warnings == [f"warning: --report-to wandb: ConnectionError: no network{rest}"]


def test_one_that_hangs_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.2)
    ended = threading.Event()
    package("wandb", monkeypatch, init=lambda **given: ended.wait(100))
    train.main(short(tmp_path, "--report-to", "wandb"))
    assert (tmp_path / "finished.json").is_file()
    assert "--report-to wandb: it has not taken all within the time" in capsys.readouterr().err
    ended.set()


def test_one_that_is_not_installed_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main(short(tmp_path / "out", "--report-to", "mlflow"))
    assert "--report-to mlflow needs its package: pip install 'qsharded[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_that_are_not_finite_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    worker = SimpleNamespace(put=lambda job: job and job(SimpleNamespace(log=lambda *sent: seen.append(sent))))
    told = object.__new__(trackers.Trackers)
    told._workers = [worker]  # type: ignore[list-item]
    told.log(3, {"step": 3, "loss": float("nan"), "grad_norm": float("inf"), "epoch": 0.5, "none": None})
    assert seen == [(3, {"epoch": 0.5})]
