import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qsharded.config import TrainConfig, parse, read_toml, write_toml

GIVEN = ("--model", "m", "--dataset", "d")


def parsed(*argv: str, **kwargs: Any) -> TrainConfig:
    return parse([*GIVEN, *argv], TrainConfig, **kwargs)


def error_of(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(argv, TrainConfig)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()[0]


def toml(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_beat_toml_which_beats_defaults(tmp_path: Path) -> None:
    path = toml(tmp_path, 'lora-r = 8\nlora_alpha = 64\nseed = 7\nmodel = "other"\n')
    config = parsed("--config", path, "--lora-r", "4")
    assert (config.lora_r, config.lora_alpha, config.seed, config.model) == (4, 64, 7, "m")
    assert config.lora_dropout == 0.0


def test_fill_sees_what_was_given_and_gives_way_to_it(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def fill(given: Any) -> dict[str, Any]:
        seen.update(given)
        return {"lora_r": 2, "seed": 3, "max_length": 64, "model": "own"}

    config = parsed("--config", toml(tmp_path, "seed = 7\n"), "--lora-r", "4", fill=fill)
    assert seen == {"model": "m", "dataset": "d", "seed": 7, "lora_r": 4}
    assert (config.lora_r, config.seed, config.max_length, config.model) == (4, 7, 64, "m")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--learning-rate", "2e-5"], "learning_rate", 2e-5),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--max-steps", "-1"], "max_steps", -1),
        (["--packing"], "packing", True),
        (["--packing", "--no-packing"], "packing", False),
        (["--no-cpu-offload"], "cpu_offload", False),
        (["--no_cpu_offload"], "cpu_offload", False),
        (["--output-dir", "with spaces, and_more"], "output_dir", "with spaces, and_more"),
        (["--output_dir=a_b=c"], "output_dir", "a_b=c"),
        (["--lora-modules-to-save", "norm", "embed_tokens"], "lora_modules_to_save", ["norm", "embed_tokens"]),
        (["--lora-modules-to-save", "norm, embed_tokens"], "lora_modules_to_save", ["norm", "embed_tokens"]),
        (["--lora-modules-to-save"], "lora_modules_to_save", []),
        (["--lora-target-modules", "all-linear"], "lora_target_modules", "all-linear"),
        (["--lora-target-modules", "q_proj"], "lora_target_modules", ["q_proj"]),
        (["--lora-target-modules", "q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora-target-modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora-target-modules", r".*\.[qk]_proj{1,2}"], "lora_target_modules", r".*\.[qk]_proj{1,2}"),
        (["--lora-rank-pattern", "q_proj=4", r"(?=a)b=8"], "lora_rank_pattern", {"q_proj": 4, "(?=a)b": 8}),
        (["--lora-alpha-pattern", "q_proj=4,v_proj=0.5"], "lora_alpha_pattern", {"q_proj": 4.0, "v_proj": 0.5}),
        (["--eval-dataset", "x", "--eval-dataset", ""], "eval_dataset", None),
    ],
)
def test_flag_values(words: list[str], field: str, value: Any) -> None:
    assert getattr(parsed(*words), field) == value


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("learning-rate = 1", "learning_rate", 1.0),
        ("packing = true", "packing", True),
        ('lora-target-modules = ["q_proj"]', "lora_target_modules", ["q_proj"]),
        ('lora-target-modules = "q_proj v_proj"', "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora-target-modules = '.*q_proj'", "lora_target_modules", ".*q_proj"),
        (
            "[lora-rank-pattern]\n'layers.0.q_proj' = 4\nq-x_y = 2",
            "lora_rank_pattern",
            {"layers.0.q_proj": 4, "q-x_y": 2},
        ),
        ('revision = ""', "revision", None),
    ],
)
def test_toml_values(tmp_path: Path, line: str, field: str, value: Any) -> None:
    assert getattr(parsed("--config", toml(tmp_path, line)), field) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--packing"], True), (["--packing", "True"], True), (["--packing=false"], False), (["--no-packing"], False)],
)
def test_a_switch_stands_alone_or_takes_true_or_false(words: list[str], value: bool) -> None:
    assert parsed(*words, "--lora-r", "8").packing is value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-rnak", "8"], "unknown key 'lora-rnak'; did you mean 'lora-r'?"),
        (["--lora_rnak=8"], "unknown key 'lora-rnak'; did you mean 'lora-r'?"),
        (["--lora"], "unknown key 'lora'; did you mean 'lora-r'?"),
        (["--zzzzzz"], "unknown key 'zzzzzz'"),
        (["-x"], "unknown key 'x'"),
        (["--packing", "maybe"], "--packing must be true or false, got 'maybe'"),
        (["--lora-r", "x"], "--lora-r must be a whole number, got 'x'"),
        (["--lora-r", "8.0"], "--lora-r must be a whole number, got '8.0'"),
        (["--lora-r", "0"], "--lora-r must be at least 1, got 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number, got nan"),
        (["--overlong", "cut"], "--overlong must be one of drop, truncate, got 'cut'"),
        (["--lora-rank-pattern", "q_proj"], "--lora-rank-pattern takes KEY=VALUE pairs, got 'q_proj'"),
        (["--lora-rank-pattern", "=4"], "--lora-rank-pattern takes KEY=VALUE pairs, got '=4'"),
    ],
)
def test_flag_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([*GIVEN, *words], capsys) == f"qsharded.train: error: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora-rnak = 8", "{path}: unknown key 'lora-rnak'; did you mean 'lora-r'?"),
        ("lora_rnak = 8", "{path}: unknown key 'lora_rnak'; did you mean 'lora-r'?"),
        ("lora-r = 8\nlora_r = 8", "{path}: key 'lora_r' is given twice, with - and with _"),
        ('lora-r = "8"', "--lora-r must be a whole number, got '8'"),
        ("lora-r = true", "--lora-r must be a whole number, got True"),
        ('packing = "yes"', "--packing must be true or false, got 'yes'"),
        ("lora-modules-to-save = [1]", "--lora-modules-to-save must be a list of names, got [1]"),
        ("output-dir = 3", "--output-dir must be text, got 3"),
        ("warmup-ratio = nan", "--warmup-ratio must be a finite number, got nan"),
    ],
)
def test_toml_errors(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml(tmp_path, text)
    assert error_of([*GIVEN, "--config", path], capsys) == "qsharded.train: error: " + message.format(path=path)


def test_text_that_is_no_toml_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml(tmp_path, "lora-r 8")
    assert error_of([*GIVEN, "--config", path], capsys).startswith(f"qsharded.train: error: {path}: ")


def test_missing_file_and_missing_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent.toml")
    assert absent in error_of([*GIVEN, "--config", absent], capsys)
    assert error_of(["--model", "m"], capsys) == "qsharded.train: error: --dataset is required"
    assert "--lora-r" in error_of([*GIVEN, "--lora-r"], capsys)


def test_help_is_printed_once_for_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["--lora-r", "x", "--help"], TrainConfig)
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m qsharded.train ")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse(["-h"], TrainConfig)
    assert exit.value.code == 0
    assert capsys.readouterr().out == ""


def changed(config: TrainConfig) -> TrainConfig:
    """The config with another value, awkward to write, in every field."""
    awkward = 'a "b"\\ \n\t\x7f é 𝄞 # ['
    texts = {
        "model": awkward,
        "lora_target_modules": r".*\.(q|k)_proj",
        "lora_modules_to_save": ["norm", awkward],
        "lora_rank_pattern": {r"layers\.\d+": 3, "q-proj": 1},
        "lora_alpha_pattern": {"x": 1e-30},
        "revision": "r",
        "adapter": "a",
        "eval_dataset": "e",
        "eval_dataset_split": "s",
        "exact_match_dataset": "x",
        "resume_from_checkpoint": "auto",
        "warmup_steps": 3,
        "save_total_limit": 2,
        "eval_steps": 5,
        "adam_epsilon": 1e22,
        "dataset_format": "text",
        "train_on": "all",
        "one_example_per_answer": False,
        "overlong": "truncate",
        "lora_dtype": "bfloat16",
        "lr_scheduler_type": "constant",
        "optim": "adamw",
        "dtype": "float32",
        "activation_checkpointing": "offloaded",
        "sharding": "auto",
        "max_steps": 12,
        "gpus": 3,
        "gpu_memory_gib": 1.5,
        "eval_split": 0.0,
    }
    names = [field.name for field in dataclasses.fields(config)]
    return dataclasses.replace(
        config, **{name: texts[name] if name in texts else other(getattr(config, name)) for name in names}
    )


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + "2" if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 3


@pytest.mark.parametrize("make", [lambda config: config, changed])
def test_written_toml_reads_back_equal(tmp_path: Path, make: Any) -> None:
    config = make(TrainConfig(model="m", dataset="d"))
    path = toml(tmp_path, write_toml(config))
    assert parse(["--config", path], TrainConfig) == config
    assert {*read_toml(Path(path), TrainConfig)} == {
        field.name for field in dataclasses.fields(config) if getattr(config, field.name) is not None
    }
