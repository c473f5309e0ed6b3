"""A run that a signal has asked to stop, at every place where it looks: what it saves, says and exits with."""

import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsharded import train
from qsharded.checkpoint.background_writer import CheckpointWriter
from qsharded.cli import command_line
from qsharded.report.run_files import read_metrics
from qsharded.training import evaluation, objective, results
from qsharded.training.metrics import MetricsLog
from qsharded.utils import signals
from tests.distributed.test_train import arguments, assert_same_file, losses
from tests.training.test_disk_room import disk_with, fill_disk
from tests.utils.test_durable_files import room_in_a_file


@pytest.fixture(autouse=True)
def listener(monkeypatch: pytest.MonkeyPatch) -> Any:
    """That of this process, which has not taken its signals over, as it was before the test."""
    monkeypatch.setattr(signals._listener, "noted", None)
    monkeypatch.setattr(signals._listener, "answer", signals._listener.answer)
    return signals._listener


@pytest.fixture
def stop_in_call(monkeypatch: pytest.MonkeyPatch, listener: Any) -> Callable[[object, str, int], None]:
    """Have SIGTERM noted in the n-th call, from 1, of a function."""

    def arrange(module: object, name: str, number: int) -> None:
        function, calls = getattr(module, name), iter(range(1, 10**6))

        def noting(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                listener.noted = signal.SIGTERM
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, noting)

    return arrange


def exit_status(words: list[str]) -> int:
    try:
        train.main(words)
    except SystemExit as end:
        return end.code
    return 0


def steps_evaluated(out: Path) -> list[int]:
    return [row["step"] for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]


def test_the_unfinished_step_is_dropped_and_a_resumed_run_does_it_again(
    model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any, listener: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 8-bit moments, whose state is on its way when the step is dropped, and a step that was not yet logged."""
    options = {"max_steps": 7, "logging_steps": 3, "eval_split": 0.0}
    train.main(arguments(model, dataset, tmp_path / "whole", **options))
    stopped = arguments(model, dataset, tmp_path / "stopped", **options)
    stop_in_call(objective, "batch_loss", 9)  # the first of the fifth step's two
    assert exit_status(stopped) == 0
    assert "stopped by SIGTERM after step 4 of 7; saved " in capsys.readouterr().out
    listener.noted = None
    train.main([*stopped, "--resume-from-checkpoint", "auto"])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_same_file(tmp_path / "whole" / "adapter", tmp_path / "stopped" / "adapter")


def test_the_exit_status_is_the_one_asked_for(model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any) -> None:
    stop_in_call(MetricsLog, "advance", 1)
    assert exit_status(arguments(model, dataset, tmp_path, max_steps=5, exit_code_when_stopped=75)) == 75


def test_a_checkpoint_of_this_step_is_not_written_again(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_in_call: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, save = [], CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda *args, **more: saved.append(1) or save(*args, **more))
    stop_in_call(CheckpointWriter, "save", 1)
    assert exit_status(arguments(model, dataset, tmp_path, max_steps=5, save_steps=2)) == 0
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"saved {checkpoint}, and" in capsys.readouterr().out
    assert (checkpoint.name, saved) == ("step-000002", [1])


def test_a_diverged_run_is_stopped_without_a_checkpoint_or_an_adapter_and_says_why(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listener: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Steps have two micro-batches: the third step is NaN, the fourth is stopped, and no log line came before."""
    loss, calls = objective.batch_loss, itertools.count(1)

    def poisoned(*args: Any) -> Any:
        call = next(calls)
        listener.noted = signal.SIGTERM if call == 7 else None
        return loss(*args) * (math.nan if call > 4 else 1)

    monkeypatch.setattr(objective, "batch_loss", poisoned)
    options = {"max_steps": 5, "save_steps": 1, "logging_steps": 5, "eval_split": 0.0}
    assert exit_status(arguments(model, dataset, tmp_path, **options)) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("stopped by SIGTERM after step 3 of 5; nothing was saved, as 1 steps were skipped by step 3")
    assert "Go back to step-000001 (what came after it is kept as step-000002.diverged): python -m" in said
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000001", "step-000002.diverged"}
    assert not (tmp_path / "adapter").exists()


def test_a_stopped_run_whose_adapter_does_not_fit_goes_on_from_its_checkpoint(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_in_call: Any,
    listener: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_adapter = results.save_adapter

    def limited(*args: Any, **kwargs: Any) -> None:
        with room_in_a_file(2000):
            save_adapter(*args, **kwargs)

    stop_in_call(MetricsLog, "advance", 3)  # a logged step calls it twice
    monkeypatch.setattr(results, "save_adapter", limited)
    stopped = arguments(model, dataset, tmp_path, max_steps=4)
    assert exit_status(stopped) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("qsharded.train: error: stopped by SIGTERM after step 2 of 4; ")
    assert "adapter_model.safetensors was not written: File too large" in said
    assert f"Checkpoint {tmp_path}/checkpoints/step-000002 holds all of the training" in said
    assert not (tmp_path / "finished.json").exists()
    monkeypatch.setattr(results, "save_adapter", save_adapter)
    listener.noted = None
    assert exit_status([*stopped, "--resume-from-checkpoint", "auto"]) == 0
    assert len(losses(tmp_path)) == 4


def test_a_stopped_run_whose_checkpoint_does_not_fit_writes_its_adapter_and_fails_in_one_line(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_in_call: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_in_call(MetricsLog, "advance", 3)  # a logged step calls it twice
    fill_disk(monkeypatch, at=2, until=3)
    assert exit_status(arguments(model, dataset, tmp_path, max_steps=4)) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "stopped by SIGTERM after step 2 of 4; checkpoint " in said
    assert said.endswith(f"The adapter so far was written to {tmp_path}/adapter")
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    assert not (tmp_path / "checkpoints").exists()


def test_before_the_end_of_the_first_step_there_is_nothing_to_save(
    model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_in_call(objective, "batch_loss", 1)
    assert exit_status(arguments(model, dataset, tmp_path, max_steps=5, eval_split=0.0)) == 128 + signal.SIGTERM
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped by SIGTERM in the first step")
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "run.json", "metrics.jsonl"}


def test_an_evaluation_between_steps_is_abandoned(
    model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_in_call(evaluation, "validation_loss", 2)
    assert exit_status(arguments(model, dataset, tmp_path, max_steps=5, eval_steps=2)) == 0
    assert "after step 2 of 5; saved" in capsys.readouterr().out
    assert steps_evaluated(tmp_path) == [0]


def test_generated_samples_are_abandoned_and_the_finished_training_is_kept(
    model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_in_call(evaluation, "exact_match", 2)
    options = arguments(model, dataset, tmp_path, max_steps=2, exact_match_dataset=dataset)
    assert exit_status([*options, "--exit-code-when-stopped", "75"]) == 0
    assert "\nstopped by SIGTERM during the last evaluation" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "finished.json").is_file()
    assert not (tmp_path / "checkpoints").exists()
    assert "exact_match" not in read_metrics(tmp_path / "metrics.jsonl")[-1]


def test_a_signal_while_the_final_adapter_is_written_leaves_it_complete(
    model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any
) -> None:
    stop_in_call(results, "save_adapter", 1)
    assert exit_status(arguments(model, dataset, tmp_path, max_steps=2)) == 0
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    assert (tmp_path / "finished.json").is_file()
    assert steps_evaluated(tmp_path) == [0]


def test_a_rank_with_an_error_on_its_way_waits_for_no_farewell(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NCCL, to leave the process group can wait for the ranks that wait for this one."""
    left = []
    monkeypatch.setattr(train, "stop_world", left.append)
    train.main(arguments(model, dataset, tmp_path, max_steps=1))
    assert len(left) == 1
    assert exit_status(arguments("no-model", dataset, tmp_path / "other")) == 1
    assert len(left) == 1


@pytest.mark.parametrize(
    "given",
    [
        ["--resume-from-checkpoint", "old", "--lora-r", "4"],
        ["--resume_from_checkpoint=old", "--lora-r", "4"],
        ["--lora-r", "4", "--overwrite-output-dir"],
        ["--overwrite_output_dir", "true", "--lora-r", "4"],
        ["--overwrite-output-dir=true", "--lora-r", "4"],
    ],
)
def test_the_command_to_go_on_resumes_and_replaces_nothing(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    monkeypatch.setattr("sys.orig_argv", ["my python", "-X", "dev", "-m", "qsharded.train", *given])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    expected = "'my python' -X dev -m qsharded.train --lora-r 4 --resume-from-checkpoint auto"
    assert command_line.command(given, 1, resume_from_checkpoint="auto") == expected


def test_the_command_of_a_run_without_arguments_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "qsharded.train"])
    assert (
        command_line.command([], 1, resume_from_checkpoint="auto")
        == "python -m qsharded.train --resume-from-checkpoint auto"
    )


def finished_before(model: Path, dataset: Path, out: Path, **options: Any) -> Callable[..., list[str]]:
    """Train to the end; from options that are others then to the command that resumes."""
    options = {"max_steps": 2, **options}
    train.main(arguments(model, dataset, out, **options))
    return lambda **others: [
        *arguments(model, dataset, out, **{**options, **others}),
        "--resume-from-checkpoint",
        "auto",
    ]


@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_finished_run_started_again_says_so_and_changes_nothing(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_steps: int,
) -> None:
    again = finished_before(model, dataset, tmp_path, save_steps=save_steps)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("qsharded.training.setup.Outline.filled", lambda *_: pytest.fail("the model is loaded"))
    assert exit_status(again(logging_steps=7)) == 0  # what changes no adapter makes no other run
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"qsharded.train: the run in {tmp_path} is finished: 2 of 2 steps")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_finished_run_is_finished_on_a_full_disk_and_when_no_checkpoint_can_be_read(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = finished_before(model, dataset, tmp_path, save_steps=1)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    for checkpoint in kept:
        (checkpoint / "manifest.json").write_text("{")
    disk_with(monkeypatch, 0)
    assert exit_status(again()) == 0
    assert "is finished: 2 of 2 steps" in capsys.readouterr().out
    monkeypatch.undo()
    # of another run the marked one is nothing to go on from, and its checkpoints may be read again one day
    assert exit_status([*again(learning_rate=0.5), "--overwrite-output-dir"]) == 1
    assert "none of the 2 checkpoints in" in capsys.readouterr().err
    assert sorted((tmp_path / "checkpoints").iterdir()) == kept


def test_a_finished_run_that_is_to_be_longer_goes_on(model: Path, dataset: Path, tmp_path: Path) -> None:
    again = finished_before(model, dataset, tmp_path, save_steps=1)
    assert exit_status(again(max_steps=3)) == 0
    assert len(losses(tmp_path)) == 3


def test_a_finished_run_is_not_taken_for_another_one(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = finished_before(model, dataset, tmp_path)
    assert exit_status(again(learning_rate=0.5)) == 1
    assert "learning_rate = 0.01, this run has 0.5" in capsys.readouterr().err


def test_a_run_that_goes_on_is_not_finished(
    model: Path, dataset: Path, tmp_path: Path, stop_in_call: Any, listener: Any
) -> None:
    again = finished_before(model, dataset, tmp_path, save_steps=1)
    stop_in_call(MetricsLog, "advance", 1)
    longer = again(max_steps=5)
    assert exit_status(longer) == 0
    assert not (tmp_path / "finished.json").exists()
    listener.noted = None
    assert exit_status(longer) == 0
    assert len(losses(tmp_path)) == 5


def test_a_damaged_mark_is_no_mark_of_this_run(model: Path, dataset: Path, tmp_path: Path) -> None:
    again = finished_before(model, dataset, tmp_path, save_steps=2)
    (tmp_path / "finished.json").write_text("{")
    os.unlink(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exit_status(again()) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
