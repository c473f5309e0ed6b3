"""Which checkpoints a run goes on from: three places say the step, and no reading error is the end."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsharded.checkpoint import intact, manifest
from qsharded.checkpoint.intact import agreed_step, newest_sound, read_sound
from qsharded.checkpoint.manifest import DamagedCheckpoint, read_manifest, verify
from tests.checkpoint.test_background_writer import write
from tests.checkpoint.test_manifest import as_first_version, edit_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (4, 8):
        write(tmp_path, step)
    return tmp_path


def checkpoint(run: Path, step: int = 8) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def test_a_sound_checkpoint_says_its_steps(run: Path) -> None:
    found = read_sound(checkpoint(run))
    assert (found.folder, found.step, found.applied_steps) == (checkpoint(run), 8, 8)


@pytest.mark.parametrize("step", [0, 4, 9, 80, "8", 8.5, True, None, -8])
def test_a_step_that_is_not_the_states_is_damage_even_without_a_hash_of_the_manifest(run: Path, step: Any) -> None:
    as_first_version(checkpoint(run), step=step)
    copy = shutil.copytree(checkpoint(run), run / "copy")  # a name that says no step
    for folder in (checkpoint(run), copy):
        for read in (read_sound, agreed_step):
            with pytest.raises(DamagedCheckpoint, match=r"step|manifest\.json is damaged"):
                read(folder)


def test_a_folder_named_after_another_step_is_damage_and_any_other_name_is_the_users(run: Path) -> None:
    best = checkpoint(run).rename(run / "checkpoints" / "step-best")
    assert read_sound(best).step == 8
    with pytest.raises(DamagedCheckpoint, match=r"step-000009 is named after another step .* says: 8"):
        read_sound(best.rename(checkpoint(run, 9)))


@pytest.mark.parametrize("lost", ["state.json", "adapter/adapter_config.json", "adapter/", "optimizer"])
def test_a_manifest_that_lists_less_than_a_checkpoint_is_damage(run: Path, lost: str) -> None:
    files = json.loads((checkpoint(run) / "manifest.json").read_text())["files"]
    as_first_version(checkpoint(run), files={name: value for name, value in files.items() if not name.startswith(lost)})
    verify(checkpoint(run))
    with pytest.raises(DamagedCheckpoint, match=f"it lists no {lost}"):
        read_sound(checkpoint(run))


def of_a_later_version(run: Path) -> None:
    edit_manifest(checkpoint(run), format_version=99)


def unreadable(number: int, name: str) -> Callable[[Path], None]:
    """A file of the newest checkpoint that the system gives an error for, whoever reads it."""

    def damage(run: Path) -> None:
        read_record, read_bytes = manifest.read_record, Path.read_bytes

        def reading(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
            def check(path: Path) -> Any:
                if path == checkpoint(run) / name:
                    raise OSError(number, errno.errorcode[number], str(path))
                return read(path)

            return check

        manifest.read_record, Path.read_bytes = reading(read_record), reading(read_bytes)  # type: ignore[method-assign]

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (of_a_later_version, "format_version 99"),
        (unreadable(errno.EIO, "manifest.json"), "EIO"),
        (unreadable(errno.EACCES, "manifest.json"), "EACCES"),
        (unreadable(errno.EIO, "adapter/adapter_model.safetensors"), "EIO"),
        (unreadable(errno.EACCES, "state.json"), "EACCES"),
        (lambda run: (checkpoint(run) / "manifest.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda run: (checkpoint(run) / "manifest.json").write_text("1" * 10_000), "manifest.json is"),
    ],
)
def test_what_cannot_be_read_is_passed_over_with_its_reason(
    run: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: str
) -> None:
    monkeypatch.setattr(manifest, "read_record", manifest.read_record)  # so that they are put back
    monkeypatch.setattr(Path, "read_bytes", Path.read_bytes)
    damage(run)
    told: list[str] = []
    assert newest_sound(run, told.append) == checkpoint(run, 4)
    assert len(told) == 1
    assert told[0].startswith("step-000008 is passed over: ")
    assert reason in told[0]


def test_a_file_called_like_a_checkpoint_is_none(run: Path) -> None:
    checkpoint(run, 9).touch()
    assert newest_sound(run, print) == checkpoint(run)
    assert read_manifest(checkpoint(run)).step == 8


def test_a_folder_that_cannot_be_listed_is_not_one_without_checkpoints(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        intact.newest_sound(run, print)
