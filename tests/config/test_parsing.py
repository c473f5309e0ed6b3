import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qsharded.config import TrainConfig, parse, read_toml, write_toml
from qsharded.config.options import options
from qsharded.config.other_names import NAMES
from tools.make_docs import PAGES

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
        (["--eval-dataset", ""], "eval_dataset", None),
        (["--eval-dataset", "e"], "eval_dataset", "e"),
        (["--eval-dataset", "a=e", "b=f"], "eval_dataset", ("a=e", "b=f")),
        (["--eval-dataset", "a=e", "--eval-dataset", "f"], "eval_dataset", ("a=e", "f")),
        (["--dataset-weights", "7"], "dataset_weights", [7.0]),
    ],
)
def test_flag_values(words: list[str], field: str, value: Any) -> None:
    assert getattr(parsed(*words), field) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--dataset", "a, b"], "a, b"),
        (["--dataset=a"], "a"),
        (["--dataset", "a", "b c", "d,e"], ("a", "b c", "d,e")),
        (["--dataset", "a", "--dataset", "b"], ("a", "b")),
        (["--dataset=a", "--seed", "1", "--dataset", "b", "c"], ("a", "b", "c")),
    ],
)
def test_datasets_add_up_and_are_taken_as_they_are(words: list[str], value: Any) -> None:
    config = parse(["--model", "m", *words], TrainConfig)
    assert config.dataset == value
    assert config.datasets == ((value,) if isinstance(value, str) else value)


@pytest.mark.parametrize(
    ("line", "value"), [('dataset = "a"', "a"), ('dataset = ["a"]', "a"), ('dataset = ["a, b", "c"]', ("a, b", "c"))]
)
def test_datasets_in_toml(tmp_path: Path, line: str, value: Any) -> None:
    path = toml(tmp_path, f'model = "m"\n{line}')
    assert parse(["--config", path], TrainConfig).dataset == value
    assert parse(["--config", path, "--dataset", "x", "y"], TrainConfig).dataset == ("x", "y")


@pytest.mark.parametrize("words", [["0.7", "0.3"], ["0.7,0.3"], ["7", "3"]])
def test_weights_of_datasets(words: list[str]) -> None:
    config = parse(["--model", "m", "--dataset", "a", "b", "--dataset-weights", *words], TrainConfig)
    assert config.dataset_weights[0] / sum(config.dataset_weights) == pytest.approx(0.7)


TWICE = {
    "plain": (["--seed", "1", "--seed", "2"], "--seed is given twice, as '--seed 1' and as '--seed 2'"),
    "equal": (["--seed", "1", "--seed", "1"], "--seed is given twice, as '--seed 1' and as '--seed 1'"),
    "with =": (["--seed", "1", "--seed=2"], "--seed is given twice, as '--seed 1' and as '--seed 2'"),
    "with _": (["--lora_r", "1", "--lora-r=2"], "--lora-r is given twice, as '--lora-r 1' and as '--lora-r 2'"),
    "apart": (["--seed=1", "--lora-r", "2", "--seed", "3"], "--seed is given twice, as '--seed 1' and as '--seed 3'"),
    "switch": (["--packing", "--packing"], "--packing is given twice, as '--packing' and as '--packing'"),
    "switch with a value": (
        ["--packing=false", "--packing"],
        "--packing is given twice, as '--packing false' and as '--packing'",
    ),
    "negated": (["--packing", "--no-packing"], "--packing is given twice, as '--packing' and as '--no-packing'"),
    "negated twice": (
        ["--no_packing", "--no-packing"],
        "--packing is given twice, as '--no-packing' and as '--no-packing'",
    ),
    "names": (
        ["--lora-target-modules", "q_proj", "v_proj", "--lora-target-modules", "k_proj"],
        "--lora-target-modules is given twice, as '--lora-target-modules q_proj v_proj' and as "
        "'--lora-target-modules k_proj'",
    ),
    "pairs": (
        ["--lora-rank-pattern", "q=1", "--lora-rank-pattern", "k=2"],
        "--lora-rank-pattern is given twice, as '--lora-rank-pattern q=1' and as '--lora-rank-pattern k=2'",
    ),
    "weights": (
        ["--dataset-weights", "1", "--dataset-weights", "2"],
        "--dataset-weights is given twice, as '--dataset-weights 1' and as '--dataset-weights 2'",
    ),
    "unset": (
        ["--adapter", "x", "--adapter", ""],
        "--adapter is given twice, as '--adapter x' and as '--adapter '",
    ),
    "config": (["--config", "a", "--config", "b"], "--config is given twice, as '--config a' and as '--config b'"),
}


@pytest.mark.parametrize(("words", "message"), TWICE.values(), ids=TWICE)
def test_a_flag_given_twice_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([*GIVEN, *words], capsys) == f"qsharded.train: error: {message}: give it once"


@pytest.mark.parametrize("command", PAGES.values(), ids=PAGES)
def test_every_command_refuses_any_flag_twice(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """But those whose values add up, which the parser knows by their kind."""
    for item in options(command):
        if not item.repeated:
            with pytest.raises(SystemExit):
                parse([item.flag, "1", item.flag, "1"], command)
            assert f"{item.flag} is given twice" in capsys.readouterr().err


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
        (["--dataset-weights", "x"], "--dataset-weights must be a list of finite numbers, got ['x']"),
        (["--dataset-weights", "inf"], "--dataset-weights must be a list of finite numbers, got [inf]"),
        (["--dataset-weights", "1", "nan"], "--dataset-weights must be a list of finite numbers, got [1.0, nan]"),
        (["--dataset-weights", "0"], "--dataset-weights must be above 0, got 0 for d: leave the dataset out"),
        (
            ["--dataset", "e", "--dataset-weights", "1", "-1"],
            "--dataset-weights must be above 0, got -1 for e: leave the dataset out",
        ),
        (
            ["--dataset", "e", "--dataset-weights", "1"],
            "--dataset-weights must be one for each --dataset: there are 1 for 2 (d, e)",
        ),
        (["--dataset=e", "f"], "unexpected argument 'f'; values follow a --key"),
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
        ("dataset-weights = 1", "--dataset-weights must be a list of finite numbers, got 1"),
        ('dataset-weights = ["1"]', "--dataset-weights must be a list of finite numbers, got ['1']"),
        ("warmup-ratio = nan", "--warmup-ratio must be a finite number, got nan"),
    ],
)
def test_toml_errors(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml(tmp_path, text)
    assert error_of([*GIVEN, "--config", path], capsys) == "qsharded.train: error: " + message.format(path=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dataset = 3", "--dataset must be text, or a list of texts, got 3"),
        ('dataset = ["a", 3]', "--dataset must be text, or a list of texts, got ('a', 3)"),
        ("dataset = []", "--dataset must name at least one dataset, got an empty list"),
        (
            'dataset = ["a", "b"]\ndataset-weights = [0.7, 0.2, 0.1]',
            "--dataset-weights must be one for each --dataset: there are 3 for 2 (a, b)",
        ),
    ],
)
def test_dataset_errors_in_toml(tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml(tmp_path, f'model = "m"\n{line}')
    assert error_of(["--config", path], capsys) == f"qsharded.train: error: {message}"


def test_text_that_is_no_toml_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml(tmp_path, "lora-r 8")
    assert error_of([*GIVEN, "--config", path], capsys).startswith(f"qsharded.train: error: {path}: ")


def test_missing_file_and_missing_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent.toml")
    assert error_of([*GIVEN, "--config", absent], capsys).endswith(
        f"--config {absent} is missing; {tmp_path} has no .toml file"
    )
    toml(tmp_path, "")
    assert f"{tmp_path} has run.toml" in error_of([*GIVEN, "--config", absent], capsys)
    elsewhere = str(tmp_path / "other" / "run.toml")
    assert f"so is the folder {tmp_path / 'other'}" in error_of([*GIVEN, "--config", elsewhere], capsys)
    assert error_of(["--model", "m"], capsys) == "qsharded.train: error: --dataset is required"
    assert "--lora-r" in error_of([*GIVEN, "--lora-r"], capsys)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "learning-rate"),
        ("epochs", "num-train-epochs"),
        ("batch_size", "per-device-train-batch-size"),
        ("model_name_or_path", "model"),
        ("rank", "lora-r"),
        ("nproc_per_node", "ranks"),
        ("learning_rte", "learning-rate"),
        ("bf16", "dtype"),
        ("eval_strategy", "eval-steps"),
        ("wandb_project", "report-to"),
    ],
)
def test_other_trainers_names_suggest_ours(theirs: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"unknown key {theirs.replace('_', '-')!r}; did you mean {ours!r}?" in error_of(
        [*GIVEN, f"--{theirs}", "1"], capsys
    )


@pytest.mark.parametrize("theirs", ["load_in_4bit", "deepspeed", "fsdp", "trust-remote-code", "attn_implementation"])
def test_what_needs_no_option_is_told(theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of([*GIVEN, f"--{theirs}", "1"], capsys)
    assert re.search(rf"unknown key '{theirs.replace('_', '-')}'; leave it out: \w+", said)


@pytest.mark.parametrize("page", PAGES)
def test_other_trainers_names_never_hide_an_option(page: str) -> None:
    keys = {item.key for item in options(PAGES[page])}
    for key in keys & set(NAMES):
        assert not set(NAMES[key].split()) & keys, key


def test_other_trainers_names_lead_to_options_and_to_one_each() -> None:
    assert set(NAMES) <= {item.key for command in PAGES.values() for item in options(command)}
    for command in PAGES.values():
        keys = [item.key for item in options(command)]
        theirs = [name for key in keys for name in NAMES.get(key, "").split()]
        assert len(theirs) == len(set(theirs))


def test_help_is_printed_once_for_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["--lora-r", "x", "--help"], TrainConfig)
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("usage: qsharded train ")
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
        "dataset": ("d, e", awkward),
        "dataset_weights": [0.7, 3.0],
        "lora_target_modules": r".*\.(q|k)_proj",
        "lora_modules_to_save": ["norm", awkward],
        "lora_rank_pattern": {r"layers\.\d+": 3, "q-proj": 1},
        "lora_alpha_pattern": {"x": 1e-30},
        "revision": "r",
        "push_to_hub": "owner/name",
        "adapter": "a",
        "data_cache": "c",
        "eval_dataset": ("a=e", "b=" + awkward),
        "eval_dataset_split": "s",
        "save_best": "eval_a_loss",
        "early_stopping_patience": 3,
        "early_stopping_threshold": 0.5,
        "sample_prompts": "p.txt",
        "sample_steps": 4,
        "report_to": ["wandb", "mlflow"],
        "exact_match_dataset": "x",
        "resume_from_checkpoint": "auto",
        "warmup_steps": 3,
        "save_total_limit": 2,
        "eval_steps": 5,
        "reshard_after_forward": "always",  # the only one that goes with --cpu-offload
        "adam_epsilon": 1e22,
        "dataset_format": "text",
        "dataset_columns": {"text": awkward},
        "bad_rows": "skip:3",
        "ignore_config_key": ("a", awkward),
        "chat_template": "f",
        "chat_template_kwargs": {"a": False, "b": awkward, "c": 1.5, "d": [1, "e"], "f": {"g": 2}},
        "template_date": "2025-01-31",
        "train_on": "all",
        "one_example_per_answer": False,
        "overlong": "truncate",
        "lora_dtype": "bfloat16",
        "lr_scheduler_type": "constant",
        "optim": "adamw",
        "dtype": "float32",
        "model_code": "transformers",
        "self_check": "never",
        "activation_checkpointing": "offloaded",
        "checkpointed_layers": 3,
        "profile": "3-4",
        "cpu_offload": False,  # it takes all layers
        "sharding": "auto",
        "max_steps": 12,
        "gpus": 3,
        "ranks": 2,
        "gpu": "H200",
        "host_memory_gib": 64.0,
        "gpu_memory_gib": 1.5,
        "eval_split": 0.0,
        "calibrate": 0,  # these three do not go with random weights, nor with an adapter
        "lora_init": "default",
        "original_model": None,
    }
    names = [field.name for field in dataclasses.fields(config)]
    return dataclasses.replace(
        config, **{name: texts[name] if name in texts else other(getattr(config, name)) for name in names}
    )


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, "a"]
    return value + "2" if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 3


@pytest.mark.parametrize("make", [lambda config: config, changed])
def test_written_toml_reads_back_equal(tmp_path: Path, make: Any) -> None:
    config = make(TrainConfig(model="m", dataset="d"))
    path = toml(tmp_path, write_toml(config))
    assert parse(["--config", path], TrainConfig) == config
    assert {*read_toml(Path(path), TrainConfig)} == {
        field.name for field in dataclasses.fields(config) if getattr(config, field.name) is not None
    }
