from pathlib import Path

import pytest

from qsharded.config import TrainConfig, builtin, builtin_overrides, parse, parse_train


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(builtin, "_FOLDER", tmp_path)
    (tmp_path / "train.toml").write_text('model = "model"\ndataset = "data/train.jsonl"\nlora-r = 4\nseed = 9\n')
    return tmp_path


def test_no_model_gives_the_built_in_run_and_flags_beat_it(folder: Path) -> None:
    config = parse(["--lora-r", "2"], TrainConfig, fill=builtin_overrides)
    assert config == TrainConfig(
        model=str(folder / "model"), dataset=str(folder / "data/train.jsonl"), lora_r=2, seed=9
    )


def test_a_model_of_the_user_leaves_the_built_in_run_out(folder: Path) -> None:
    config = parse(["--model", "m", "--dataset", "d"], TrainConfig, fill=builtin_overrides)
    assert config == TrainConfig(model="m", dataset="d")


def test_the_shipped_run_is_valid_and_its_files_exist() -> None:
    config = parse([], TrainConfig, fill=builtin_overrides)
    paths = (config.model, config.dataset, config.eval_dataset, config.exact_match_dataset)
    assert all(Path(path).exists() for path in paths if path is not None)


def test_rows_for_the_built_in_model_are_told_as_perhaps_a_slip(folder: Path) -> None:
    assert "without --model the built-in one is trained" in builtin.builtin_note(parse_train(["--dataset", "d"]))
    assert builtin.builtin_note(parse_train([])) == ""
    assert builtin.builtin_note(parse_train(["--model", "m", "--dataset", "d"])) == ""
