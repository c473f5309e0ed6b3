from pathlib import Path
from typing import Any

import pytest

from qsharded.config import TrainConfig, parse
from qsharded.config.options import options
from qsharded.data.formats import FORMATS


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "dataset": "d", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "--max-steps must be -1 or at least 1, got 0"),
        ({"max_steps": -2}, "--max-steps must be -1 or at least 1, got -2"),
        ({"warmup_ratio": 1.0}, "--warmup-ratio must be at least 0 and below 1, got 1.0"),
        ({"lora_dropout": -0.1}, "--lora-dropout must be at least 0 and below 1, got -0.1"),
        ({"learning_rate": 0}, "--learning-rate must be above 0, got 0"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm must be at least 0, got -1.0"),
        ({"eval_dataset": "e", "eval_split": 0.1}, "--eval-split is for runs without --eval-dataset, got 0.1 and one"),
        (
            {"eval_dataset": ("a/x.jsonl", "b/x.jsonl")},
            "--eval-dataset has two sets called 'x', a/x.jsonl and b/x.jsonl: give each a name of its own, as "
            "NAME=PATH",
        ),
        ({"eval_dataset": ("e", "")}, "--eval-dataset names an empty set beside others: leave it out"),
        (
            {"eval_dataset": ("a=x", "b=y"), "eval_steps": 1, "save_best": "eval_loss"},
            "--save-best 'eval_loss' is not measured by this run, which measures eval_a_loss, eval_a_perplexity, "
            "eval_b_loss, eval_b_perplexity",
        ),
        (
            {"save_best": "eval_loss"},
            "--save-best 'eval_loss' is not measured by this run, which measures nothing: give --eval-dataset, "
            "--eval-split or --exact-match-dataset",
        ),
        (
            {"eval_dataset": "e", "save_best": "eval_loss"},
            "--save-best compares evaluations: say with --eval-steps how often there is one",
        ),
        (
            {"eval_dataset": "e", "eval_steps": 1, "early_stopping_patience": 2},
            "--early-stopping-patience and -threshold need --save-best, which says what is compared",
        ),
        (
            {"eval_dataset": "e", "eval_steps": 1, "save_best": "eval_loss", "early_stopping_threshold": 0.1},
            "--early-stopping-threshold is for --early-stopping-patience",
        ),
        ({"report_to": ["wandb", "wb"]}, "--report-to takes tensorboard, wandb, mlflow, got 'wb'"),
        ({"sample_steps": 2}, "--sample-steps needs prompts to answer: give --sample-prompts"),
        ({"streaming": True}, "--streaming reads as many rows as --max-steps takes: give --max-steps"),
        (
            {"one_example_per_answer": True, "train_on": "all"},
            "--one-example-per-answer learns the answers: it does not go with --train-on all",
        ),
        (
            {"cpu_offload": True, "activation_checkpointing": "none"},
            "--cpu-offload goes with --activation-checkpointing full or offloaded, which compute a layer again "
            "when its weights are back, not with none",
        ),
        (
            {"checkpointed_layers": 3},
            "--checkpointed-layers says for how many layers --activation-checkpointing full, offloaded or selective "
            "is; it does not go with auto",
        ),
        (
            {"checkpointed_layers": 3, "activation_checkpointing": "none"},
            "--checkpointed-layers says for how many layers --activation-checkpointing full, offloaded or selective "
            "is; it does not go with none",
        ),
        (
            {"checkpointed_layers": 3, "activation_checkpointing": "full", "cpu_offload": True},
            "--cpu-offload needs all layers checkpointed: leave --checkpointed-layers out",
        ),
        ({"checkpointed_layers": 0}, "--checkpointed-layers must be at least 1, got 0"),
        (
            {"sharding": "replicate", "cpu_offload": True},
            "--sharding replicate keeps all weights on every GPU, which --cpu-offload contradicts",
        ),
        (
            {"sharding": "replicate", "dp_replicate": 2},
            "--sharding replicate keeps all weights on every GPU, which --dp-replicate 2 contradicts",
        ),
        ({"lora_target_modules": []}, "--lora-target-modules must name at least one layer"),
        ({"lora_target_modules": ""}, "--lora-target-modules must name at least one layer"),
        (
            {"lora_rank_pattern": {"a": 0}},
            "--lora-rank-pattern must be above 0 for every KEY, got 0 for 'a'",
        ),
    ],
)
def test_refused_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        config(**values)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("field", "value"), [("lora_target_modules", "(q_proj"), ("lora_alpha_pattern", {"(q_proj": 1.0})]
)
def test_broken_regular_expressions_are_named(field: str, value: Any) -> None:
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^{flag} must be a regular expression, got '\(q_proj'"):
        config(**{field: value})


def test_model_and_dataset_are_required() -> None:
    with pytest.raises(TypeError, match="dataset"):
        TrainConfig(model="m")


def test_formats_are_those_that_the_data_code_reads() -> None:
    choices = {item.name: item.choices for item in options(TrainConfig)}
    assert choices["dataset_format"] == FORMATS


@pytest.mark.parametrize(("bad_rows", "skipped"), [("stop", 0), ("skip:0", 0), ("skip:12", 12)])
def test_bad_rows_that_may_be_skipped(bad_rows: str, skipped: int) -> None:
    assert config(bad_rows=bad_rows).skip_bad_rows == skipped


@pytest.mark.parametrize("bad_rows", ["skip", "skip:", "skip:-1", "skip:x", "3", ""])
def test_other_words_for_bad_rows_are_refused(bad_rows: str) -> None:
    with pytest.raises(ValueError, match=r"^--bad-rows must be stop, or skip:N with a number N, got "):
        config(bad_rows=bad_rows)


@pytest.mark.parametrize("day", ["2025-13-01", "today", "01.02.2025", " "])
def test_a_template_date_must_be_one(day: str) -> None:
    with pytest.raises(ValueError, match=r"^--template-date must be a date such as 2025-01-31, got "):
        config(template_date=day)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["prompt=question,completion=answer"], "dataset_columns", {"prompt": "question", "completion": "answer"}),
        (["prompt=my question", "completion=a,b"], "dataset_columns", {"prompt": "my question", "completion": "a,b"}),
        (["enable_thinking=false"], "chat_template_kwargs", {"enable_thinking": False}),
        (
            ["a=1,b=text c", "d=[1, 2]", "e=null", 'f={"x": 1}', "g=x=y"],
            "chat_template_kwargs",
            {"a": 1, "b": "text c", "d": [1, 2], "e": "null", "f": {"x": 1}, "g": "x=y"},
        ),
    ],
)
def test_tables_of_text_and_of_json(words: list[str], field: str, value: dict[str, Any]) -> None:
    given = parse(["--model", "m", "--dataset", "d", "--" + field.replace("_", "-"), *words], TrainConfig)
    assert getattr(given, field) == value


@pytest.mark.parametrize(
    ("given", "sets", "measured"),
    [
        (None, {}, []),
        ("d/held.jsonl", {"": "d/held.jsonl"}, ["eval_loss", "eval_perplexity"]),
        ("a=d/held.jsonl", {"a": "d/held.jsonl"}, ["eval_a_loss", "eval_a_perplexity"]),
        (
            ("d/held.jsonl", "owner/name", "my-set=x=y"),
            {"held": "d/held.jsonl", "name": "owner/name", "my-set": "x=y"},
            [f"eval_{name}_{what}" for name in ("held", "name", "my-set") for what in ("loss", "perplexity")],
        ),
    ],
)
def test_evaluation_sets_have_names(given: Any, sets: dict[str, str], measured: list[str]) -> None:
    config = TrainConfig(model="m", dataset="d", eval_dataset=given)
    assert config.eval_sets == sets
    assert config.measures == measured


def test_a_file_whose_name_has_an_equals_sign_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.jsonl").touch()
    assert TrainConfig(model="m", dataset="d", eval_dataset="lr=1.jsonl").eval_sets == {"": "lr=1.jsonl"}
