"""Which checkpoints stay: as many usable ones as were asked for, and one that a finite gradient was taken at."""

from pathlib import Path

import pytest

from qsharded.checkpoint.background_writer import CheckpointWriter
from qsharded.checkpoint.resume import Progress, checkpoints
from qsharded.checkpoint.retention import drop_old_checkpoints, newest_proved, set_aside
from tests.checkpoint.test_background_writer import LORA, WORLD, make, write
from tests.checkpoint.test_manifest import as_first_version, edit_manifest


def steps(run: Path) -> list[int]:
    return [int(folder.name[-6:]) for folder in checkpoints(run)]


def save(to: CheckpointWriter, step: int, skipped: int = 0) -> None:
    to.save(*_arguments(step), Progress(step=step, skipped_steps=skipped), base_model="base")
    to.wait()


def _arguments(step: int):
    model, optimizer = make(float(step))
    return model, LORA, optimizer


@pytest.mark.parametrize("damaged", [(6,), (4, 6), (2, 4, 6)])
def test_what_is_damaged_does_not_count_among_those_kept(tmp_path: Path, damaged: tuple[int, ...]) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    for step in damaged:
        edit_manifest(tmp_path / "checkpoints" / f"step-{step:06d}", world_size=2)
    drop_old_checkpoints(tmp_path, 2)
    assert steps(tmp_path) == {1: [4, 6, 8], 2: [2, 4, 6, 8], 3: [2, 4, 6, 8]}[len(damaged)]


def test_a_step_in_a_damaged_manifest_deletes_nothing(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    as_first_version(tmp_path / "checkpoints" / "step-000006", step=0)
    drop_old_checkpoints(tmp_path, 2)
    assert steps(tmp_path) == [2, 4, 6]


def test_the_one_before_stays_until_a_finite_gradient_was_taken_at_the_newest(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, WORLD, 1) as to:
        save(to, 4)
        save(to, 8)
        assert steps(tmp_path) == [4, 8]
        to.check(Progress(step=9, skipped_steps=1).applied_steps)  # a skipped step proves nothing
        to.wait()
        assert steps(tmp_path) == [4, 8]
        assert newest_proved(tmp_path, 8).folder.name == "step-000004"
        to.check(Progress(step=10, skipped_steps=1).applied_steps)
        to.wait()
        assert steps(tmp_path) == [8]
        save(to, 12, skipped=1)
        to.keep_newest()
        assert steps(tmp_path) == [12]


def test_checkpoints_after_skipped_steps_do_not_push_out_the_last_good_one(tmp_path: Path) -> None:
    """Steps 5 to 7 are skipped: what is saved at 6 and 7 has the weights of 5, at which every gradient is NaN."""
    with CheckpointWriter(tmp_path, WORLD, 2) as to:
        for step, skipped in ((3, 0), (4, 0), (5, 1), (6, 2), (7, 3)):
            save(to, step, skipped)
            assert 3 in steps(tmp_path)
    assert steps(tmp_path) == [3, 6, 7]
    assert newest_proved(tmp_path, 4).step == 3


def test_a_progress_that_is_refused_is_not_saved_and_deletes_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, WORLD, 1, lambda progress: "no room" if progress.step > 1 else None) as to:
        save(to, 1)
        assert to.save(*_arguments(2), Progress(step=2), base_model="base") == "no room"
    assert steps(tmp_path) == [1]


def test_what_is_set_aside_keeps_its_files_and_takes_no_other_ones_place(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path, 1)
        set_aside(checkpoints(tmp_path)[0], "unreadable")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000001.unreadable", "step-000001.unreadable-2"}
    assert all((tmp_path / "checkpoints" / name / "manifest.json").is_file() for name in names)
