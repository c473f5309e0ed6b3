"""What a run deletes in the folder that it writes to."""

import shutil
from pathlib import Path

import pytest

from qsharded.config import TrainConfig
from qsharded.output import claim_output_dir
from tests.checkpoint.test_writer import WORLD, write


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
