"""Which evaluation is the best, how many since then were no better, and what a run does about it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from qsharded import train
from qsharded.checkpoint.resume import Progress
from qsharded.config import TrainConfig
from qsharded.report.run_files import read_metrics
from qsharded.training import evaluation, results
from qsharded.training.best import Judge
from qsharded.utils.durable_files import NotWritten
from tests.training.short_runs import rows as builtin_rows
from tests.training.short_runs import short

WEIGHTS = "adapter_model.safetensors"


def judged(values: list[float], measure: str = "eval_loss", **options: Any) -> list[tuple[bool, int, bool]]:
    """(whether it is the best, evaluations no better since the best, whether patience is out) after each."""
    given = {"eval_dataset": "e", "exact_match_dataset": "x", "eval_steps": 1, "save_best": measure, **options}
    judge = Judge(TrainConfig(model="m", dataset="d", **given), Progress())
    found = []
    for step, value in enumerate(values):
        judge.progress.step = step
        best = judge.is_best({measure: value, "eval_perplexity": -step})
        judge.note({measure: value}, kept=best)
        found.append((best, judge.best.no_better if judge.best else -1, judge.is_patience_out()))
    return found


def test_the_smallest_loss_is_the_best_and_the_base_models_does_not_count() -> None:
    assert judged([0.5, 3.0, 2.0, 2.0, 2.5, 1.0]) == [
        (False, -1, False), (True, 0, False), (True, 0, False), (False, 1, False), (False, 2, False), (True, 0, False)
    ]  # fmt: skip


def test_the_largest_accuracy_is_the_best() -> None:
    assert [best for best, *_ in judged([0.0, 0.2, 0.1, 0.3], "exact_match")] == [False, True, False, True]


def test_a_loss_that_is_not_finite_is_never_better() -> None:
    found = judged([0.0, math.nan, 2.0, math.nan, math.inf], early_stopping_patience=2)
    assert found == [(False, -1, False), (False, -1, False), (True, 0, False), (False, 1, False), (False, 2, True)]


def test_less_than_the_threshold_is_kept_but_not_counted_as_better() -> None:
    found = judged([0.0, 3.0, 2.9, 2.85, 1.0], early_stopping_patience=2, early_stopping_threshold=0.2)
    assert found[1:] == [(True, 0, False), (True, 1, False), (True, 2, True), (True, 0, False)]


def test_another_measure_is_compared_anew() -> None:
    progress = Progress(step=4, best={"measure": "eval_loss", "value": 0.1, "step": 2, "no_better": 3})
    given: dict[str, Any] = {"eval_dataset": "e", "eval_steps": 1, "early_stopping_patience": 1}
    config = TrainConfig(model="m", dataset="d", save_best="eval_perplexity", **given)
    assert Judge(config, progress).is_best({"eval_perplexity": 50.0})
    assert not Judge(config, progress).is_patience_out()


LOSSES = {0: 9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 1.25, 6: 0.5}
KEPT = ["--eval-dataset", str(builtin_rows("eval.jsonl", 20)), "--eval-steps", "1", "--save-best", "eval_loss"]
EVERY = ["--save-steps", "1", "--logging-steps", "1"]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations say :data:`LOSSES`, one for each step; the steps evaluated at."""
    steps: list[int] = []
    log = train.Trainer.opened.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, config: TrainConfig, world: Any, setup: Any, *others: Any, **more: Any) -> Any:
        def losses(*_: Any) -> dict[str, float]:
            steps.append(setup.progress.step)
            return {"eval_loss": LOSSES[setup.progress.step]}

        monkeypatch.setattr(evaluation, "validation_loss", losses)
        return log(cls, config, world, setup, *others, **more)

    monkeypatch.setattr(train.Trainer, "opened", classmethod(opened))
    return steps


def kept_at(out: Path) -> Any:
    return json.loads((out / "best" / "best.json").read_text())


def test_best_holds_the_adapter_of_the_best_step(tmp_path: Path, scripted: list[int]) -> None:
    train.main(short(tmp_path, *KEPT, *EVERY))
    assert scripted == [0, 1, 2, 3, 4, 5, 6]
    assert kept_at(tmp_path) == {"measure": "eval_loss", "value": LOSSES[6], "step": 6}
    assert (tmp_path / "best" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    assert (tmp_path / "best" / "tokenizer.json").is_file()
    assert "best/ has the adapter of step 6" in (tmp_path / "report.html").read_text()


def test_a_run_ends_when_its_patience_is_out_and_goes_on_with_more(
    tmp_path: Path, scripted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    patient = [*KEPT, *EVERY, "--early-stopping-patience"]
    train.main(short(out, *patient, "3"))
    said = capsys.readouterr().out
    assert "ended after step 5 of 6, as 3 evaluations in a row were no better" in said
    assert f"best eval_loss 1 at step 2: its adapter is in {out}/best" in said
    assert scripted == [0, 1, 2, 3, 4, 5]  # the last one is not made twice
    assert kept_at(out)["step"] == 2
    second = out / "checkpoints" / "step-000002" / "adapter" / WEIGHTS
    assert (out / "best" / WEIGHTS).read_bytes() == second.read_bytes()
    assert "finished early" in (out / "report.html").read_text()
    auto = ["--resume-from-checkpoint", "auto"]
    train.main(short(out, *patient, "3", *auto))
    assert (
        "is finished: ended early, as --early-stopping-patience was out, after 5 of 6 steps" in capsys.readouterr().out
    )
    train.main(short(out, *patient, "4", *auto))
    assert scripted[6:] == [6]
    assert kept_at(out)["step"] == 6


def test_patience_and_the_best_go_on_with_a_resumed_run(tmp_path: Path, scripted: list[int]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    patient = [*KEPT, *EVERY, "--early-stopping-patience", "3"]
    train.main(short(whole, *patient))
    shutil.copytree(whole, out)
    del scripted[:]
    train.main(short(out, *patient, "--resume-from-checkpoint", str(out / "checkpoints" / "step-000004")))
    assert scripted == [5]
    assert kept_at(out) == kept_at(whole)
    assert (out / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()
    steps = [[row["step"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (out, whole)]
    assert steps[0] == steps[1]


def test_a_best_adapter_that_does_not_fit_is_a_warning(
    tmp_path: Path, scripted: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter = results.save_adapter

    def full(model: Any, lora: Any, folder: Path, **others: Any) -> None:
        if folder.name == "best" and scripted[-1] > 1:
            raise NotWritten("no room")
        save_adapter(model, lora, folder, **others)

    monkeypatch.setattr(results, "save_adapter", full)
    train.main(short(tmp_path, *KEPT))
    said = capsys.readouterr()
    assert "warning: the adapter of step 2, the best so far, was not written: no room" in said.err
    assert f"best eval_loss 3 at step 1: its adapter is in {tmp_path}/best" in said.out
    assert not (tmp_path / "best" / "best.json").exists()  # nobody knows what the adapter there is now


def test_exact_answers_can_be_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.1, 0.4, 0.2])  # before, at 2, at 4, after

    def matched(model: Any, tokenizer: Any, prompts: Any, **others: Any) -> evaluation.ExactMatch:
        return evaluation.ExactMatch(next(shares), [""] * len(prompts))

    monkeypatch.setattr(evaluation, "exact_match", matched)
    exact = [
        "--exact-match-dataset",
        str(builtin_rows("eval.jsonl", 20)),
        "--eval-steps",
        "2",
        "--save-best",
        "exact_match",
    ]
    train.main(short(tmp_path, *exact))
    assert kept_at(tmp_path) == {"measure": "exact_match", "value": 0.4, "step": 4}
