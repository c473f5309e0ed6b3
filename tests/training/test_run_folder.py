"""What a run deletes in the folder that it writes to."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsharded import train
from qsharded.config import TrainConfig
from qsharded.training.run_folder import check_output_dir, claim_output_dir, find_resumed
from tests.checkpoint.test_background_writer import WORLD, write


@pytest.mark.parametrize("copy", ["best", "checkpoints/best"])
def test_going_on_from_a_copy_deletes_what_came_later_alone(tmp_path: Path, copy: str) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoints" / "step-000002", tmp_path / copy)
    claim_output_dir(TrainConfig(model="", dataset="", output_dir=str(tmp_path)), WORLD, tmp_path / copy)
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} == {"step-000001", "step-000002"}
    assert (tmp_path / copy).is_dir()


def test_a_new_run_leaves_what_was_renamed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000001").rename(tmp_path / "checkpoints" / "step-best")
    claim_output_dir(TrainConfig(model="", dataset="", output_dir=str(tmp_path)), WORLD, None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-best"]


def auto(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="", dataset="", output_dir=str(folder), resume_from_checkpoint="auto", **options)


def steps(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def resume(config: TrainConfig) -> Path | None:
    """All that a run does with its folder before it trains."""
    found = find_resumed(config, WORLD)
    check_output_dir(config, WORLD, found)
    claim_output_dir(config, WORLD, found)
    return found


def test_one_flipped_bit_in_a_manifest_deletes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The issue's: "step": 8 became 0, the run went on from there, and every checkpoint was deleted as a later one."""
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    path = tmp_path / "checkpoints" / "step-000008" / "manifest.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 0'))
    assert resume(auto(tmp_path)) == tmp_path / "checkpoints" / "step-000006"
    assert steps(tmp_path) == {"step-000002", "step-000004", "step-000006", "step-000008.unreadable"}
    assert "step-000008 is passed over: " in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoints_that_cannot_be_read_now_are_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    for step in (2, 4):
        write(tmp_path, step)
        path = tmp_path / "checkpoints" / f"step-{step:06d}" / "manifest.json"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be gone on from"):
        resume(auto(tmp_path, overwrite_output_dir=overwrite))
    assert steps(tmp_path) == {"step-000002", "step-000004"}


def test_going_back_deletes_what_is_known_to_be_newer_and_moves_what_is_not(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000006" / "manifest.json").write_text("{}")
    named = tmp_path / "checkpoints" / "step-000002"
    resume(TrainConfig(model="", dataset="", output_dir=str(tmp_path), resume_from_checkpoint=str(named)))
    assert steps(tmp_path) == {"step-000002", "step-000006.unreadable"}


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    named = tmp_path / "checkpoints" / "step-000002"
    path = named / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    config = TrainConfig(model="", dataset="", output_dir=str(tmp_path), resume_from_checkpoint=str(named))
    with pytest.raises(ValueError, match=r"--resume-from-checkpoint: .*manifest\.json is damaged"):
        find_resumed(config, WORLD)


def a_file(folder: Path) -> Path:
    folder.write_text("")
    return folder


def below_a_file(folder: Path) -> Path:
    folder.write_text("")
    return folder / "deep" / "out"


def with_a_file_for_a_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "checkpoints").write_text("")
    return folder


def with_a_folder_for_a_file(folder: Path) -> Path:
    (folder / "config.toml").mkdir(parents=True)
    return folder


def in_the_kernels(folder: Path) -> Path:
    return Path("/proc/self/out")  # no user, root included, makes a folder there


@pytest.mark.parametrize(
    "prepare", [a_file, below_a_file, with_a_file_for_a_folder, with_a_folder_for_a_file, in_the_kernels]
)
def test_an_output_that_cannot_be_written_is_found_before_model_and_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], Path]
) -> None:
    output = prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        train.main(f"--model not/here --dataset nor-this --output-dir {output} --overwrite-output-dir".split())
    message = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message.startswith(f"qsharded.train: error: --output-dir {output}")
    assert message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "mkdir", "fsync"])
def test_what_the_system_says_of_the_output_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    """Tests may run as root, whom no permission stops: so the calls themselves fail."""

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*{"open": (Path, "open"), "mkdir": (Path, "mkdir"), "fsync": (os, "fsync")}[call], failing)
    output = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match=rf"--output-dir {output} cannot be written to: {os.strerror(number)}"):
        check_output_dir(TrainConfig(model="", dataset="", output_dir=str(output)), WORLD, None)
    assert list(tmp_path.iterdir()) == []


def test_looking_at_the_output_leaves_nothing_there(tmp_path: Path) -> None:
    check_output_dir(TrainConfig(model="", dataset="", output_dir=str(tmp_path / "a" / "b")), WORLD, None)
    assert list(tmp_path.iterdir()) == []
