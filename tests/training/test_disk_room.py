"""Room on the disk: what a run needs, what it is refused for, and what it leaves out instead of ending."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import train
from qsharded.checkpoint.resume import checkpoints
from qsharded.config import TrainConfig
from qsharded.report.run_files import read_metrics
from qsharded.training import results
from qsharded.training.disk_room import Sizes, lack_of_room, refuse_full_disk, room_note
from tests.utils.test_durable_files import room_in_a_file

Usage = namedtuple("Usage", "total used free")
HEADERS = 1 << 18  # what is reckoned for them


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 1 << 40) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(total, total - free, free))


def config(output: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="", dataset="", output_dir=str(output), **options)


def test_the_sizes_are_those_of_what_trains_its_moments_and_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bytes(700))
    parameters = [torch.nn.Parameter(torch.zeros(1000, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    weights = 1000 * 4 + 1000 * 2
    found = Sizes.of(parameters, "adamw", [tmp_path / "tokenizer.json"])
    assert found.adapter == weights + 700 + HEADERS
    assert found.checkpoint == 3 * weights + HEADERS
    # the ranks' rows, and what they are joined to
    assert found.unfinished_checkpoint == 4 * weights + HEADERS


SIZES = Sizes(adapter=100, checkpoint=300, unfinished_checkpoint=400)


@pytest.mark.parametrize(
    ("options", "freed", "resumed", "needed"),
    [
        ({}, 0, False, 500),
        ({}, 60, False, 440),
        ({"save_steps": 0}, 0, False, 100),
        ({}, 0, True, 100),  # a checkpoint is there to go on from, and the adapter may be all that is missing
    ],
)
def test_a_run_starts_where_its_adapter_and_one_checkpoint_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, freed: int, resumed: bool, needed: int
) -> None:
    disk_with(monkeypatch, needed)
    refuse_full_disk(config(tmp_path, **options), SIZES, freed=freed, resumed=resumed)
    disk_with(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match=rf"--output-dir {tmp_path} has {needed - 1 + freed} bytes free, .* take"):
        refuse_full_disk(config(tmp_path, **options), SIZES, freed=freed, resumed=resumed)
    disk_with(monkeypatch, 0, total=0)  # the file system does not say
    refuse_full_disk(config(tmp_path, **options), SIZES, freed=freed, resumed=resumed)


def test_the_summary_says_that_not_all_checkpoints_will_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, 100 + 3 * 300 - 1)
    assert room_note(config(tmp_path), SIZES, 2) == []
    assert "3 checkpoints and the adapter take 1,000" in room_note(config(tmp_path), SIZES, 3)[0]
    # two are kept and one is written
    assert "3 checkpoints and" in room_note(config(tmp_path, save_total_limit=2), SIZES, 50)[0]
    assert room_note(config(tmp_path, save_total_limit=1), SIZES, 50) == []
    assert room_note(config(tmp_path, save_steps=0), SIZES, 50) == []


def test_a_save_needs_room_for_the_adapter_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, 500)
    assert lack_of_room(tmp_path, SIZES) is None
    disk_with(monkeypatch, 499)
    assert lack_of_room(tmp_path, SIZES) == f"{tmp_path} has 499 bytes free, a checkpoint and the adapter take 500"


def arguments(model: Path, dataset: Path, output: Path, **options: Any) -> list[str]:
    settings = {"model": model, "dataset": dataset, "output_dir": output, "max_length": 64, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "lora_r": 2, "save_steps": 1}
    return [word for key, value in (settings | options).items() for word in (f"--{key}", str(value))]


def test_a_full_disk_is_found_before_the_rows_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("no rows at all\n")
    disk_with(monkeypatch, 1000)
    with pytest.raises(SystemExit):
        train.main(arguments(model, rows, tmp_path / "out"))
    message = capsys.readouterr().err
    assert "out has 1,000 bytes free, an adapter and a checkpoint of this run take " in message
    assert not (tmp_path / "out").exists()


def fill_disk(monkeypatch: pytest.MonkeyPatch, at: int, until: int) -> None:
    """The disk is full when the steps from ``at`` on are saved, and has room again at ``until``."""
    refusal = results.save_refusal

    def when_full(config: Any, setup: Any, progress: Any) -> str | None:
        disk_with(monkeypatch, 0 if at <= progress.step < until else 1 << 40)
        return refusal(config, setup, progress)

    monkeypatch.setattr(results, "save_refusal", when_full)


def test_a_save_that_does_not_fit_is_left_out_loudly_and_training_goes_on(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(monkeypatch, at=2, until=3)
    train.main(arguments(model, dataset, tmp_path / "out"))
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["step-000001", "step-000003"]
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1
    assert warned[0].startswith("warning: checkpoint step-000002 is left out: ")
    assert "0 bytes free, a checkpoint and the adapter take " in warned[0]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_a_disk_that_fills_while_a_checkpoint_is_written_stops_nothing_but_the_last(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's own error, in the thread that writes the checkpoint of step 2."""
    from qsharded.checkpoint import background_writer

    write_own = background_writer.CheckpointWriter._write_own_files

    def limited(self: Any, job: Any) -> None:
        with room_in_a_file(2000 if job.progress["step"] in failing else 1 << 40):
            write_own(self, job)

    monkeypatch.setattr(background_writer.CheckpointWriter, "_write_own_files", limited)
    failing = {2}
    train.main(arguments(model, dataset, tmp_path / "out"))
    printed = capsys.readouterr().err
    assert "step-000002 was not written: " in printed
    assert "File too large; it takes " in printed
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-000001", "step-000003"}
    failing = {3}
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(model, dataset, tmp_path / "last"))
    assert stopped.value.code == 1
    assert "step-000003 was not written: " in capsys.readouterr().err
    assert (tmp_path / "last" / "adapter" / "adapter_model.safetensors").exists()


def test_the_last_checkpoint_does_not_go_missing_without_a_word(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(monkeypatch, at=3, until=4)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(model, dataset, tmp_path / "out", save_steps=2))
    assert stopped.value.code == 1
    (last,) = capsys.readouterr().err.splitlines()
    assert "step-000003 was not written: " in last
    assert last.endswith(f"The adapter was written to {tmp_path}/out/adapter")
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 1
