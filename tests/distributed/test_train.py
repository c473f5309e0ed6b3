"""The trainer from its command line: what it writes, how it resumes, what stops it."""

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qsharded import train
from qsharded.checkpoint import background_writer, load_model
from qsharded.data import Example, Tokenizer, load_examples
from qsharded.report.run_files import read_metrics
from qsharded.training import evaluation, objective, trainer
from qsharded.training import run_folder as output
from tests.checkpoints import write_chat_checkpoint
from tests.distributed.harness import run_ranks


def arguments(model: Path, dataset: Path, output: Path, **options: Any) -> list[str]:
    settings = {
        "model": model,
        "dataset": dataset,
        "output_dir": output,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_split": 0.1,
        "save_steps": 0,
    } | options
    several = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
    return [word for key, values in several.items() for word in (f"--{key}", *map(str, values))]


def run(*args: Any) -> None:
    train.main(arguments(*args[:3], **args[3]))


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(("world_size", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_training_learns_and_writes_what_it_says(
    model: Path, dataset: Path, tmp_path: Path, world_size: int, dtype: str
) -> None:
    options = {"max_steps": 12, "eval_steps": 4, "dtype": dtype}
    run_ranks(run, world_size, model, dataset, tmp_path / "out", options)
    out = tmp_path / "out"
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8, 12]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert evaluated[-1] < 0.8 * evaluated[0]
    assert {path.name for path in (out / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert "learning-rate = 0.01" in (out / "config.toml").read_text()


def test_the_logged_loss_is_the_mean_over_trained_tokens(model: Path, tmp_path: Path) -> None:
    """Of all ranks, micro-batches and steps since the last line, which have very unequal numbers of them."""
    answers = ["ab" * n for n in (1, 20, 2, 1, 14, 3, 1, 1, 25, 2)]  # a step of 8 rows, and one of 2
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": "<u>a<a>", "completion": answer}) + "\n" for answer in answers))
    options = {"max_steps": 2, "logging_steps": 2, "learning_rate": 1e-12, "lora_dropout": 0, "eval_split": 0}
    run_ranks(run, 2, model, dataset, tmp_path / "out", options)
    expected = mean_token_loss(model, load_examples(dataset, Tokenizer.from_folder(model), max_length=64).examples)
    assert losses(tmp_path / "out") == pytest.approx([expected], rel=1e-5)


def mean_token_loss(model: Path, examples: list[Example]) -> float:
    """PyTorch's cross-entropy of each row's trained tokens, one row at a time."""
    ours, total, tokens = load_model(model, dtype=torch.float32), 0.0, 0
    for example in examples:
        ids, trained = torch.from_numpy(example.ids).long(), torch.from_numpy(example.trained)[1:]
        logits = ours(ids[None])[0, :-1][trained]
        total += torch.nn.functional.cross_entropy(logits, ids[1:][trained], reduction="sum").item()
        tokens += int(trained.sum())
    return total / tokens


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_continues_to_the_last_bit(model: Path, dataset: Path, tmp_path: Path, world_size: int) -> None:
    options = {"max_steps": 7, "save_steps": 3, "logging_steps": 2, "save_total_limit": 1}
    run_ranks(run, world_size, model, dataset, tmp_path / "whole", options)
    stopped = tmp_path / "stopped"
    if world_size == 1:
        run_ranks(run_until, world_size, 5, model, dataset, stopped, options)
        assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000003"]
    else:
        with pytest.raises(AssertionError):
            run_ranks(run_killed_while_saving, world_size, 6, model, dataset, stopped, options)
        found = {path.name for path in (stopped / "checkpoints").iterdir()}
        assert found == {"step-000003", "step-000006.partial"}
    run_ranks(run, world_size, model, dataset, stopped, options | {"resume_from_checkpoint": "auto"})
    assert losses(stopped) == losses(tmp_path / "whole")
    assert len(losses(stopped)) == 4
    assert_same_file(tmp_path / "whole" / "adapter", stopped / "adapter")


def test_resuming_from_a_copy_deletes_no_older_checkpoint(model: Path, dataset: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"max_steps": 6, "save_steps": 2, "save_total_limit": 2}
    run(model, dataset, out, options | {"max_steps": 4})
    best = shutil.copytree(out / "checkpoints" / "step-000002", out / "best")
    kept = shutil.copytree(out / "checkpoints" / "step-000002", out / "checkpoints" / "step-000002-best")
    run(model, dataset, out, options | {"resume_from_checkpoint": best})
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000004", "step-000006", kept.name}


@pytest.fixture(scope="module")
def interrupted(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that went through, and the same one, stopped after its checkpoint of step 2."""
    whole, stopped = tmp_path_factory.mktemp("whole") / "out", tmp_path_factory.mktemp("stopped") / "out"
    run_ranks(run, 2, model, dataset, whole, INTERRUPTED)
    run_ranks(run_until, 2, 3, model, dataset, stopped, INTERRUPTED)
    return whole, stopped


INTERRUPTED = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    "mode",
    [
        {"dp_replicate": 2, "activation_checkpointing": "selective"},
        {"sharding": "auto", "activation_checkpointing": "none"},
        {"cpu_offload": "true", "activation_checkpointing": "offloaded"},
    ],
)
def test_a_run_is_resumed_in_another_mode(
    model: Path, dataset: Path, interrupted: tuple[Path, Path], tmp_path: Path, mode: dict[str, Any]
) -> None:
    whole, stopped = interrupted
    out = shutil.copytree(stopped, tmp_path / "out")
    run_ranks(run, 2, model, dataset, out, INTERRUPTED | mode | {"resume_from_checkpoint": "auto"})
    # fp32 sums in another order; steps of AdamW blow their last bits up
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(out)) == 4


def run_until(last_step: int, *args: Any) -> None:
    """Die in the middle of a run, as a machine that is taken away does."""
    step = trainer.Trainer.train_step

    def dying(run: trainer.Trainer, *rest: Any) -> Any:
        if run.setup.progress.step == last_step:
            raise KeyboardInterrupt
        return step(run, *rest)

    trainer.Trainer.train_step = dying
    with pytest.raises(KeyboardInterrupt):
        run(*args)


def run_killed_while_saving(step: int, *args: Any) -> None:
    """Have the main rank killed when all it lacks of that step's checkpoint is the manifest."""
    write_manifest = background_writer.write_manifest

    def deadly(folder: Path, manifest: Any) -> None:
        if manifest.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write_manifest(folder, manifest)

    background_writer.write_manifest = deadly
    run(*args)


def test_a_run_resumed_by_other_ranks_goes_on_alike(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Six rows a step, shared by two ranks, then by one or three: sums in another order, so equal but for rounding."""
    options = {"max_steps": 6, "save_steps": 3, "lora_dropout": 0, "gradient_accumulation_steps": 1, "lora_r": 3}
    options |= {"optim": "adamw"}  # 8-bit state that two ranks share is rounded anew
    batch = "per_device_train_batch_size"
    run_ranks(run, 2, model, dataset, tmp_path / "two", options | {batch: 3})
    expected = losses(tmp_path / "two")[3:]
    resumed = options | {"resume_from_checkpoint": tmp_path / "two" / "checkpoints" / "step-000003"}
    run(model, dataset, tmp_path / "one", resumed | {batch: 6})
    run_ranks(run, 3, model, dataset, tmp_path / "three", resumed | {batch: 2})
    for ranks in ("one", "three"):
        assert losses(tmp_path / ranks) == pytest.approx(expected, rel=1e-6)


def write_texts(path: Path, letter: str, count: int, first: int = 0) -> Path:
    """Rows that are told apart by their number of letters."""
    rows = [{"prompt": "<u>", "completion": letter * n} for n in range(first + 1, first + count + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_trained_on(out: Path, *args: Any) -> list[list[tuple[int, int]]]:
    """(first trained id, number of them) of each row of every step, in no order; by this rank."""
    accumulate, steps = trainer.accumulate_gradient, []

    def watched(model: Any, step: Any, *rest: Any, **options: Any) -> Tensor:
        targets = [row[row != -100] for batch in step.micro_batches for row in batch.targets]
        steps.append([(int(row[0]), len(row)) for row in targets if len(row)])
        return accumulate(model, step, *rest, **options)

    trainer.accumulate_gradient = watched
    run(*args[:2], out, args[2])
    return steps


def mixed(ranks: list[list[list[tuple[int, int]]]]) -> list[set[tuple[int, int]]]:
    """The rows of each step, of all ranks."""
    return [{row for rank in step for row in rank} for step in zip(*ranks, strict=True)]


def test_a_weighted_mixture_is_trained_on_alike_by_any_ranks_and_resumed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 6 and 20 rows in shares of 3 to 1 an epoch takes 6 and 2."""
    few, many = write_texts(tmp_path / "few.jsonl", "a", 6), write_texts(tmp_path / "many.jsonl", "b", 20, 10)
    weights = {"eval_split": 0, "dataset_weights": "3,1", "lora_dropout": 0, "per_device_train_batch_size": 2}
    weights |= {"max_steps": 6, "save_steps": 3, "optim": "adamw", "lora_r": 3}
    mixture = [few, "--dataset", many]
    two = mixed(run_ranks(rows_trained_on, 2, tmp_path / "two", model, mixture, weights | ONE_BATCH))
    a, b = (Tokenizer.from_folder(model).encode(letter)[0] for letter in "ab")
    epochs = [two[0] | two[1], two[2] | two[3], two[4] | two[5]]
    for epoch in epochs:
        assert {row for row in epoch if row[0] == a} == {(a, n) for n in range(2, 8)}  # with the end of the text
        assert sum(row[0] == b for row in epoch) == 2
    assert len({row for epoch in epochs for row in epoch if row[0] == b}) == 6
    resumed = weights | ONE_BATCH | {"resume_from_checkpoint": tmp_path / "two" / "checkpoints" / "step-000003"}
    resumed |= {"per_device_train_batch_size": 4}
    one = rows_trained_on(tmp_path / "one", model, mixture, resumed)
    assert mixed([one]) == two[3:]
    printed = capsys.readouterr().out
    assert f"data {few}: 6 rows of up to 64 tokens; 6 an epoch (75.0% of the mixture)" in printed
    assert f"data {many}: 20 rows of up to 64 tokens; 2 an epoch (25.0% of the mixture)" in printed
    with pytest.raises(SystemExit):
        run(model, mixture, tmp_path / "two", resumed | {"dataset_weights": "1,1"})
    assert "was written with dataset_weights = [3.0, 1.0], this run has [1.0, 1.0]" in capsys.readouterr().err


ONE_BATCH = {"gradient_accumulation_steps": 1}


def test_datasets_that_share_a_file_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_texts(tmp_path / "rows.jsonl", "a", 3)
    for again in (rows, tmp_path, tmp_path / ".." / tmp_path.name / "rows.jsonl"):
        with pytest.raises(SystemExit):
            train.main(arguments(model, [rows, again], tmp_path / "out"))
        assert f"--dataset {rows} and --dataset {again} both hold {rows}" in capsys.readouterr().err


def test_deterministic_kernels_change_nothing_on_a_cpu(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the option does, and taken back afterwards
    train.main(arguments(model, dataset, tmp_path / "plain", max_steps=2))
    try:
        train.main([*arguments(model, dataset, tmp_path / "deterministic", max_steps=2), "--deterministic"])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert losses(tmp_path / "plain") == losses(tmp_path / "deterministic")


def assert_same_file(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def run_with_infinite_loss(bad_steps: list[int], *args: Any) -> str:
    """Train where the last rank's loss is infinite in some steps; returns what stopped the run."""
    accumulate, loss = trainer.accumulate_gradient, objective.batch_loss
    is_last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def sometimes_infinite(*args: Any, step_number: int, **kwargs: Any) -> Tensor:
        bad = is_last_rank and step_number in bad_steps
        objective.batch_loss = lambda model, batch: loss(model, batch) * (torch.inf if bad else 1)
        result = accumulate(*args, step_number=step_number, **kwargs)
        objective.batch_loss = loss
        return result

    trainer.accumulate_gradient = sometimes_infinite
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        run(*args)
    return printed.getvalue()


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw8bit"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(
    model: Path, dataset: Path, tmp_path: Path, optim: str
) -> None:
    options = {"max_steps": 4, "max_skipped_steps": 2, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    options |= {"optim": optim}
    stopped_by = run_ranks(run_with_infinite_loss, 2, [1, 2], model, dataset, tmp_path / "out", options)
    assert stopped_by == ["", ""]
    rows = [row for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2]
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False]
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_a_skipped_steps_loss_leaves_json_that_is_valid_and_a_run_that_goes_on(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    """It is logged, and kept in the checkpoint between two log lines, as null."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    options = {"max_steps": 4, "max_skipped_steps": 1, "save_steps": 2, "logging_steps": 3}
    assert run_ranks(run_with_infinite_loss, 1, [1], model, dataset, tmp_path, options) == [""]
    whole = read_metrics(tmp_path / "metrics.jsonl")
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    state = json.loads((checkpoint / "state.json").read_text(), parse_constant=refuse)
    assert state["window"]["loss"] is None
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    run_ranks(run, 1, model, dataset, tmp_path, options | {"resume_from_checkpoint": checkpoint})
    resumed = read_metrics(tmp_path / "metrics.jsonl")
    first, second = ([row["loss"] for row in rows if "loss" in row] for rows in (whole, resumed))
    assert first == second
    assert [loss is None for loss in first] == [True, False]


def test_too_many_skipped_steps_stop_the_run_at_a_log_line(model: Path, dataset: Path, tmp_path: Path) -> None:
    options = {"max_steps": 6, "logging_steps": 3}
    stopped_by = run_ranks(run_with_infinite_loss, 2, [1], model, dataset, tmp_path / "out", options)
    assert all("1 steps were skipped by step 3" in message for message in stopped_by)
    assert all(message.count("\n") == 1 for message in stopped_by)
    assert not (tmp_path / "out" / "adapter").exists()


def test_going_on_with_an_adapter_starts_where_it_ended(model: Path, dataset: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(arguments(model, dataset, first, max_steps=6))
    train.main(arguments(model, dataset, second, max_steps=1, adapter=first / "adapter", learning_rate=1e-9))
    rows = read_metrics(first / "metrics.jsonl")
    begun = read_metrics(second / "metrics.jsonl")[0]
    assert begun["eval_loss"] == [row for row in rows if "eval_loss" in row][-1]["eval_loss"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dataset": "no/such/folder/rows.jsonl"}, "no/such is no local file or folder"),
        ({"model": "no-such-model"}, "no-such-model is neither a folder nor a Hub id"),
        ({"adapter": "no-such-adapter"}, "no-such-adapter"),
        ({"resume_from_checkpoint": "no-such-checkpoint"}, "no-such-checkpoint"),
        ({"lora_target_modules": "no_such_layer"}, "no_such_layer"),
        ({"lora_modules_to_save": "no_such_module"}, "no_such_module"),
    ],
)
def test_mistakes_are_one_line_that_names_them(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, complaint: str
) -> None:
    options = {"output_dir": tmp_path / "out", "model": model, "dataset": dataset} | change
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(options.pop("model"), options.pop("dataset"), options.pop("output_dir"), **options))
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("qsharded.train: error: ")
    assert complaint in message
    assert message.count("\n") == 1


def test_an_earlier_run_is_not_overwritten_untold(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(arguments(model, dataset, tmp_path, max_steps=1))
    for options in ({}, {"resume_from_checkpoint": "auto", "seed": 1}):  # the same run is finished, which is no error
        with pytest.raises(SystemExit):
            train.main(arguments(model, dataset, tmp_path, max_steps=1, **options))
        assert "holds an earlier run (adapter)" in capsys.readouterr().err
    train.main([*arguments(model, dataset, tmp_path, max_steps=2), "--overwrite-output-dir"])
    assert len(losses(tmp_path)) == 2


def test_a_mistake_costs_no_earlier_run(model: Path, dataset: Path, tmp_path: Path) -> None:
    """What --overwrite-output-dir replaces is replaced when the new run is ready to start, and not before."""
    train.main(arguments(model, dataset, tmp_path, max_steps=1))
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    mistakes = [
        {"model": "no-such-model"},
        {"lora_target_modules": "no_such_layer"},
        {"adapter": tmp_path / "adapter"},
        {"lora_rank_pattern": "q_proj=0"},
    ]
    for mistake in mistakes:
        options = {"model": model, "dataset": dataset, "output": tmp_path} | mistake
        named = [options.pop(name) for name in ("model", "dataset", "output")]
        with pytest.raises(SystemExit):
            train.main([*arguments(*named, **options), "--overwrite-output-dir"])
        assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"lora_alpha": 64}, "lora_alpha = 32.0, this run has 64.0"),
        ({"seed": 1}, "seed = 42, this run has 1"),
        ({"max_length": 32}, "max_length = 64, this run has 32"),
        ({"per_device_train_batch_size": 1}, "rows_per_step = 4, this run has 2"),
        ({"optim": "adamw"}, "moments = '8 bits', this run has 'fp32'"),
    ],
)
def test_a_run_is_resumed_under_its_own_settings(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, complaint: str
) -> None:
    options = {"max_steps": 2, "save_steps": 1, "resume_from_checkpoint": "auto"}
    train.main(arguments(model, dataset, tmp_path, **options))
    with pytest.raises(SystemExit):
        train.main(arguments(model, dataset, tmp_path, **options | change))
    assert complaint in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_or_refused(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
    train.main(arguments(model, dataset, tmp_path, **options))
    whole = losses(tmp_path)
    damaged = tmp_path / "checkpoints" / "step-000004"
    file = damaged / "optimizer-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(SystemExit):
        train.main(arguments(model, dataset, tmp_path, **options, resume_from_checkpoint=damaged))
    assert f"{file} is damaged" in capsys.readouterr().err
    train.main(arguments(model, dataset, tmp_path, **options, resume_from_checkpoint="auto"))
    printed = capsys.readouterr()
    passed_over, kept = printed.err.splitlines()
    assert passed_over.startswith(f"qsharded.train: step-000004 is passed over: {file} is damaged")
    assert f"kept as {damaged}.unreadable" in kept
    assert "step-000003 at step 3" in printed.out
    assert losses(tmp_path) == whole


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_a_line(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000003.partial").write_text("in the way")
    with pytest.raises(SystemExit):
        train.main(arguments(model, dataset, tmp_path, max_steps=3, save_steps=3))
    message = capsys.readouterr().err
    assert message.startswith("qsharded.train: error: checkpoint ")
    assert "step-000003 was not written: " in message
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def run_on_own_disk(model: Path, dataset: Path, folder: Path) -> str:
    output._VISIBLE_AFTER_S = 0.2
    own = folder / str(torch.distributed.get_rank())
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        train.main(arguments(model, dataset, own, max_steps=1, save_steps=1))
    return printed.getvalue()


def test_nodes_that_do_not_share_the_output_are_told(model: Path, dataset: Path, tmp_path: Path) -> None:
    for message in run_ranks(run_on_own_disk, 2, model, dataset, tmp_path):
        assert "rank 1 does not see what rank 0 writes to --output-dir" in message
    assert list(tmp_path.glob("*/*")) == []


def test_resuming_an_older_checkpoint_drops_the_newer_ones(model: Path, dataset: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
    train.main(arguments(model, dataset, tmp_path, **options))
    resumed = {"max_steps": 2, "resume_from_checkpoint": tmp_path / "checkpoints" / "step-000001"}
    train.main(arguments(model, dataset, tmp_path, **options | resumed))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_token_beyond_the_embedding_is_found_before_training(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_chat_checkpoint(tmp_path, vocab_size=60)
    with pytest.raises(SystemExit):
        train.main(arguments(other, dataset, tmp_path / "out", max_steps=1))
    assert "but the model's vocab_size is 60" in capsys.readouterr().err


def test_the_adapter_is_written_before_the_last_evaluation(model: Path, dataset: Path, tmp_path: Path) -> None:
    evaluate, calls = evaluation.validation_loss, []

    def failing(*args: Any) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return evaluate(*args)

    evaluation.validation_loss = failing
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            train.main(arguments(model, dataset, tmp_path, max_steps=1))
    finally:
        evaluation.validation_loss = evaluate
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_adapter_does_in_peft_what_it_does_here(model: Path, dataset: Path, tmp_path: Path) -> None:
    """PEFT's model carries our dequantized NF4 weights, so that the adapter alone could make a difference."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qsharded.checkpoint import load_model
    from qsharded.checkpoint.adapter import load_adapter, read_lora_config
    from qsharded.nn import PackedLinear

    train.main([*arguments(model, dataset, tmp_path, max_steps=3), "--use-rslora", "--lora-alpha-pattern", "q_proj=3"])
    adapter = tmp_path / "adapter"
    ours = load_model(model, lora=read_lora_config(adapter), dtype=torch.float32).eval()
    load_adapter(ours, adapter)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, module in ours.named_modules():
        if isinstance(module, PackedLinear):
            theirs.get_submodule(name.removesuffix(".base_layer")).weight.data = module.dequantize(torch.float32)
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        plain = theirs(ids).logits
        adapted = PeftModel.from_pretrained(theirs, adapter).eval()(ids).logits
        torch.testing.assert_close(ours(ids), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.1


def test_the_best_adapter_is_whole_on_two_ranks_and_samples_are_written_once(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("aa\nbb\n")
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "save_best": "eval_loss", "sample_prompts": prompts}
    run_ranks(run, 2, model, dataset, tmp_path / "out", options | {"sample_steps": 2, "sample_max_new_tokens": 3})
    out = tmp_path / "out"
    told = json.loads((out / "best" / "best.json").read_text())
    found = {row["step"]: row["eval_loss"] for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row}
    assert (told["step"], told["value"]) == min(((step, found[step]) for step in (2, 4)), key=lambda one: one[1])
    assert_same_file(out / "checkpoints" / f"step-{told['step']:06d}" / "adapter", out / "best")
    assert [row["step"] for row in read_metrics(out / "samples.jsonl")] == [0, 0, 2, 2, 4, 4]
    assert json.loads((out / "run.json").read_text())["ranks"] == 2
    assert "--ranks 2" in (out / "report.html").read_text()
