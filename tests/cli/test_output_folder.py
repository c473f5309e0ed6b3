"""A folder that a command writes beside what the user has there."""

from pathlib import Path

import pytest

from qsharded.cli.output_folder import complete_or_absent


def test_a_folder_that_only_looks_unfinished_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    (tmp_path / "usual").mkdir()
    with complete_or_absent(tmp_path / "out") as unfinished:
        (unfinished / "new").touch()
    assert (tmp_path / "out.partial" / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial", "usual"}
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_nothing_is_left_of_an_end_that_is_not_reached(tmp_path: Path) -> None:
    with pytest.raises(KeyError), complete_or_absent(tmp_path / "new" / "out"):
        raise KeyError
    assert list((tmp_path / "new").iterdir()) == []
