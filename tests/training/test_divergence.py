"""A run that diverges, from its first NaN to the end of the run that its advice starts: on the built-in model."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import qsharded
from qsharded import train
from qsharded.checkpoint.background_writer import CheckpointWriter
from qsharded.checkpoint.resume import Progress, checkpoints
from qsharded.checkpoint.retention import newest_proved
from qsharded.cli import command_line
from qsharded.config import TrainConfig
from qsharded.report.run_files import read_metrics
from qsharded.training import divergence
from qsharded.training.resuming import Resumed
from tests.checkpoint.test_background_writer import WORLD, write
from tests.checkpoint.test_retention import save

BUILTIN = Path(qsharded.__file__).parent / "builtin"


def arguments(output: Path, *more: str) -> list[str]:
    words = f"--model {BUILTIN}/model --dataset {BUILTIN}/train.jsonl --output-dir {output} --max-length 128 --packing"
    words += " --per-device-train-batch-size 2 --gradient-accumulation-steps 1 --max-steps 6"
    words += " --warmup-steps 2"  # the first step at half of the rate leaves weights that can still be trained
    logging = [] if "--logging-steps" in more else ["--logging-steps", "2"]
    return [*words.split(), *logging, *more]


def stopped_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("qsharded.train: error: ")
    assert "steps were skipped by step" in message
    return message


def advised(message: str) -> list[str]:
    """The arguments of the command at the message's end, which is there to be copied."""
    command = shlex.split(message[message.index("python -m qsharded.train") :])
    return command[3:]


def assert_finished(output: Path) -> None:
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["step"] == 6
    assert rows[-1]["loss"] is not None
    assert rows[-1]["grad_norm"] is not None
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


@pytest.mark.parametrize("limit", [[], ["--save-total-limit", "1"]])
def test_following_the_advice_to_the_letter_finishes_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: list[str]
) -> None:
    """With a checkpoint at each step: those after the rate's damage must neither be named nor push the good one out."""
    out = tmp_path / "out"
    message = stopped_by(arguments(out, "--learning-rate", "50", "--save-steps", "1", *limit), capsys)
    assert "Lower --learning-rate" in message
    assert "Go back to step-000001 (what came after it is kept as step-000002.diverged)" in message
    assert [folder.name for folder in checkpoints(out)] == ["step-000001"]
    train.main(advised(message))
    assert_finished(out)


def test_going_on_with_auto_takes_the_checkpoint_that_the_advice_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a batch script does, of which only the rate was changed."""
    out = tmp_path / "out"
    stopped_by(arguments(out, "--learning-rate", "50", "--save-steps", "1"), capsys)
    train.main(arguments(out, "--learning-rate", "2e-4", "--resume-from-checkpoint", "auto"))
    assert "resumed from" in capsys.readouterr().out
    assert_finished(out)


def test_without_a_checkpoint_to_go_back_to_the_advice_starts_again_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    message = stopped_by(arguments(out, "--learning-rate", "50", "--save-steps", "0"), capsys)
    assert "No checkpoint is fit to go back to" in message
    train.main(advised(message))
    assert_finished(tmp_path / "out-2")


def test_nothing_is_saved_while_more_steps_were_skipped_than_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 3 on all are skipped, one is allowed: step 3 may be saved, those after it may not."""
    out = tmp_path / "out"
    options = ["--learning-rate", "50", "--save-steps", "1", "--logging-steps", "5", "--max-skipped-steps", "1"]
    message = stopped_by(arguments(out, *options), capsys)
    assert "3 steps were skipped by step 5" in message
    names = {re.sub(r"\..*", "", folder.name) for folder in (out / "checkpoints").iterdir()}
    assert names == {"step-000001", "step-000002", "step-000003"}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(model="", dataset="", output_dir=str(tmp_path), max_skipped_steps=2)


def test_what_is_allowed_counts_from_where_the_run_was_resumed(config: TrainConfig) -> None:
    assert not divergence.has_diverged(config, Progress(step=9, skipped_steps=2))
    assert divergence.has_diverged(config, Progress(step=9, skipped_steps=3))
    assert not divergence.has_diverged(config, Progress(step=99, skipped_steps=27, skipped_before=25))
    assert divergence.has_diverged(config, Progress(step=99, skipped_steps=28, skipped_before=25))


def test_a_resumed_run_begins_with_nothing_skipped(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, WORLD, None) as to:
        save(to, 30, skipped=25)  # as versions wrote that saved what had diverged
    progress = Resumed.read(checkpoints(tmp_path)[0], WORLD).progress
    assert (progress.skipped_steps, progress.skipped_since_start) == (25, 0)


def test_a_damaged_checkpoint_is_not_what_the_advice_names(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000004" / "state.json").write_text("{}")
    assert newest_proved(tmp_path, applied_steps=6).folder.name == "step-000002"


@pytest.mark.parametrize(("rate", "next_rate"), [(50.0, "0.0002"), (1e-3, "0.0001"), (1e-5, "1e-06")])
def test_the_rate_to_try_next_is_a_tenth_and_no_higher_than_the_default(
    tmp_path: Path, rate: float, next_rate: str
) -> None:
    config = TrainConfig(model="", dataset="", output_dir=str(tmp_path), learning_rate=rate)
    again = partial(command_line.command, ["--learning-rate", str(rate), "--seed", "7"], 1)
    message = divergence.advice(config, Progress(step=3, skipped_steps=1), again)
    assert f"--learning-rate {next_rate} " in message
    assert f"--learning-rate {rate} " not in message
