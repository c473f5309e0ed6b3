"""Runs know what they resume, and adapters which base they are for: from the command line, on one rank."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qsharded import generate, merge, quantize, train
from qsharded.checkpoint.files import write_json
from qsharded.checkpoint.manifest import read_manifest, write_manifest
from qsharded.config import TrainConfig
from qsharded.training.resuming import Resumed, kept_accumulation
from qsharded.utils.untrusted_json import read_json
from tests.adapters import transformers_model, write_adapter
from tests.checkpoints import write_chat_checkpoint, write_chat_rows
from tests.distributed.test_train import arguments

OPTIONS = {"max_steps": 2, "save_steps": 2, "eval_split": 0}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model/, other/ (the same shapes), rows.jsonl, and the output run/ of a run on model/."""
    folder = tmp_path_factory.mktemp("first")
    for name, seed in (("model", 0), ("other", 1)):
        (folder / name).mkdir()
        write_chat_checkpoint(folder / name, seed=seed)
    write_chat_rows(folder / "rows.jsonl", 22)
    with contextlib.chdir(folder):
        train.main(arguments(Path("model"), Path("rows.jsonl"), Path("run"), **OPTIONS))
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same elsewhere, to change and to resume in: the current folder."""
    monkeypatch.chdir(shutil.copytree(first, tmp_path / "place"))
    return tmp_path / "place"


def resume(place: Path, *flags: str, model: str = "model", dataset: str = "rows.jsonl", **options: Any) -> None:
    options = OPTIONS | {"max_steps": 3, "resume_from_checkpoint": "auto"} | options
    train.main([*arguments(place / model, Path(dataset), place / "run", **options), *flags])


def refusal(capsys: pytest.CaptureFixture[str], command: Any, *args: Any, **kwargs: Any) -> str:
    """What a command says that stops with one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*args, **kwargs)
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert told.count("error") == told.count("\n") - told.count("note: ") == 1
    return told


def edit(weights: Path, name: str) -> None:
    tensors = load_file(weights)
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights)


def newest_state(place: Path) -> dict[str, Any]:
    return read_json(max((place / "run" / "checkpoints").iterdir()) / "state.json")


# What a run resumes


def test_the_same_data_and_base_at_another_path_are_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "rows.jsonl").rename(place / "moved.jsonl")
    (place / "model").rename(place / "moved")
    resume(place, model="moved", dataset="moved.jsonl")
    printed = capsys.readouterr()
    assert "at step 2" in printed.out
    assert "note" not in printed.out + printed.err


def test_other_rows_under_the_same_path_are_refused_by_number(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    (place / "rows.jsonl").write_text("".join([*lines[:7], lines[8], *lines[8:]]))
    told = refusal(capsys, resume, place)
    assert "step-000002 was trained on other rows: the first whose ids differ is row 8; " in told
    assert "options and tokenizer are the same, so the dataset's content changed" in told
    (place / "rows.jsonl").write_text("".join(lines[:20]))
    assert "20 rows, there were 22; those in both are the same" in refusal(capsys, resume, place)
    (place / "rows.jsonl").rename(place / "fewer.jsonl")
    assert "--dataset was rows.jsonl, is fewer.jsonl" in refusal(capsys, resume, place, dataset="fewer.jsonl")


def test_rows_that_an_option_or_the_template_makes_others_are_explained(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(capsys, resume, place, train_on="all")
    assert "the first whose loss masks differ is row 1; --train-on was assistant, is all" in told
    settings = place / "model" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<{{ m.role[0] }}>", "<{{ m.role[0] }}> "))
    told = refusal(capsys, resume, place)
    assert "the first whose ids differ is row 1; the tokenizer's tokenizer_config.json changed" in told


def test_another_base_of_the_same_shapes_is_refused_with_its_tensor(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "trained on another base model than --model" in refusal(capsys, resume, place, model="other")
    edit(place / "model" / "model.safetensors", "model.layers.1.self_attn.k_proj.weight")
    told = refusal(capsys, resume, place)
    assert "tensors differ, the first is model.layers.1.self_attn.k_proj.weight in model.safetensors" in told
    assert "--allow-other-base" in told
    again = arguments(place / "model", place / "rows.jsonl", place / "new", **OPTIONS)
    again += ["--adapter", str(place / "run" / "checkpoints" / "step-000002" / "adapter")]
    assert "adapter was trained on another base model" in refusal(capsys, train.main, again)
    train.main([*again, "--allow-other-base"])  # as the message says


def test_the_packed_form_of_the_base_goes_on_with_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize.main(["--model", str(place / "model"), "--output", str(place / "packed")])
    resume(place, model="packed")
    assert "note" not in capsys.readouterr().out
    quantize.main(["--model", str(place / "other"), "--output", str(place / "other-packed")])
    assert "tensors differ" in refusal(capsys, resume, place, model="other-packed", max_steps=4)


def test_changed_hyper_parameters_are_taken_told_in_one_line_and_recorded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"learning_rate": 3e-3, "weight_decay": 0.5, "adam_beta2": 0.95, "lora_dropout": 0.0, "max_grad_norm": 2}
    resume(place, **changes, logging_steps=7, max_steps=4)
    line = "changed since the checkpoint: --learning-rate 0.01 -> 0.003, --max-steps 2 -> 4, --weight-decay 0.0 -> 0.5,"
    line += " --adam-beta2 0.999 -> 0.95, --max-grad-norm 1.0 -> 2.0, --lora-dropout 0.1 -> 0.0\n"
    assert line in capsys.readouterr().out
    state = newest_state(place)
    assert state["settings"]["learning_rate"] == 3e-3
    assert "step 2: --learning-rate 0.01 -> 0.003" in state["changes"]
    resume(place, **changes, max_steps=4)
    assert "changed since" not in capsys.readouterr().out


def test_a_checkpoint_without_fingerprints_is_resumed_with_a_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "run" / "checkpoints" / "step-000002"
    state = read_json(folder / "state.json")
    kept = ("dataset_format", "dataset_split", "train_on", "max_length", "overlong", "packing", "eval_split", "seed")
    old = {name: state["settings"][name] for name in (*kept, "rows_per_step", "moments")} | {"dataset": "elsewhere"}
    written = {"step": 2, "epoch": 0, "row": 8, "skipped_steps": 0, "window": {}, "settings": old}
    manifest = read_manifest(folder)
    record = write_json(folder / "state.json", written)
    write_manifest(folder, replace(manifest, files=manifest.files | {"state.json": record}))
    assert "train_on = 'assistant', this run has 'all'" in refusal(capsys, resume, place, train_on="all")
    resume(place, save_steps=3)
    printed = capsys.readouterr().out
    assert printed.count("was written by a version that kept no fingerprints") == 1
    assert newest_state(place)["data"]["rows"] == 22


# Which base an adapter is for


def ask(model: Path, adapter: Path, *flags: str) -> None:
    chosen = ["--model", str(model), "--adapter", str(adapter), "--prompt", "a", "--max-new-tokens", "1"]
    generate.main([*chosen, *flags])


def fold(model: Path, adapter: Path, *flags: str) -> None:
    output = adapter.parent / f"merged-{len(list(adapter.parent.iterdir()))}"
    merge.main(["--model", str(model), "--adapter", str(adapter), "--output", str(output), *flags])


def go_on(model: Path, adapter: Path, *flags: str) -> None:
    run = arguments(model, model.parent / "rows.jsonl", model.parent / "next", **OPTIONS, overwrite_output_dir="true")
    train.main([*run, "--adapter", str(adapter), *flags])


@pytest.mark.parametrize("command", [ask, fold, go_on])
def test_an_adapter_is_refused_on_another_base_unless_that_is_allowed(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, command: Any
) -> None:
    adapter = place / "run" / "adapter"
    caplog.set_level("INFO")
    moved = (place / "model").rename(place / "moved")
    command(moved, adapter)
    assert "note: " not in capsys.readouterr().out + caplog.text
    told = refusal(capsys, command, place / "other", adapter)
    assert f"{adapter} was trained on another base model than --model {place / 'other'}: " in told
    assert "tensors differ, the first is " in told
    command(place / "other", adapter, "--allow-other-base")
    assert "taken all the same, as --allow-other-base says" in capsys.readouterr().out + caplog.text


@pytest.mark.parametrize("command", [ask, fold, go_on])
def test_an_adapter_of_pefts_is_taken_with_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, command: Any
) -> None:
    caplog.set_level("INFO")
    command(place / "model", write_adapter(place / "theirs", place / "model"))
    said = capsys.readouterr().out + caplog.text
    assert said.count("does not record the weights it was trained on") == 1


@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
def test_an_adapter_trained_on_packed_weights_fits_them_and_their_original(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, form: str
) -> None:
    caplog.set_level("INFO")
    quantize.main(["--model", str(place / "model"), "--output", str(place / "packed"), "--format", form])
    ask(place / "packed", place / "run" / "adapter")
    train.main(arguments(place / "packed", place / "rows.jsonl", place / "second", **OPTIONS))
    for command, model in ((ask, "packed"), (ask, "model"), (fold, "model")):
        command(place / model, place / "second" / "adapter")
    assert "note: " not in capsys.readouterr().out + caplog.text
    assert "tensors differ" in refusal(capsys, fold, place / "other", place / "second" / "adapter")


def test_peft_reads_an_adapter_of_ours_without_a_warning(
    first: Path, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    adapter = first / "run" / "adapter"
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        recorded = json.loads(file.metadata()["qsharded_base"])
    assert recorded["own"]["tensors"].keys() == load_file(first / "model" / "model.safetensors").keys()
    model = PeftModel.from_pretrained(transformers_model(first / "model"), adapter)
    assert not [str(w.message) for w in recwarn if "nexpected" in str(w.message)]
    ours = load_file(adapter / "adapter_model.safetensors")
    theirs = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


# Files that were cut off


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "model/model.safetensors", "model/config.json"])
def test_a_shortened_file_is_refused_in_one_line_with_its_name(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / "rows.parquet")
    whole = (place / name).read_bytes()
    (place / name).write_bytes(whole[: -len(whole) // 3])
    dataset = place / (name if name.startswith("rows") else "rows.jsonl")
    args = arguments(place / "model", dataset, place / "new", **OPTIONS)
    assert str(place / name) in refusal(capsys, train.main, args)


def test_a_damaged_page_of_parquet_names_its_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    file = place / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    content = bytearray(file.read_bytes())
    content[30:38] = b"\xff" * 8
    file.write_bytes(content)
    told = refusal(capsys, train.main, arguments(place / "model", file, place / "new", **OPTIONS))
    assert f"{file}: not readable as parquet" in told


# Other numbers of ranks


@pytest.mark.parametrize(
    ("ranks", "batch", "accumulation", "expected"),
    [
        (2, 2, 3, 3),  # as it was
        (4, 2, 3, 3),  # 12 rows do not divide by 8: refused later
        (1, 2, 3, 6),
        (3, 2, 3, 2),
        (3, 4, 3, 1),
        (1, 12, 3, 1),
        (2, 1, 3, 3),  # the same ranks: a changed batch is meant, and refused later
    ],
)
def test_rows_of_a_step_are_kept_where_they_divide(
    first: Path, ranks: int, batch: int, accumulation: int, expected: int
) -> None:
    """The checkpoint is of 2 ranks x 2 rows x 3 micro-batches."""
    read = Resumed._of(first / "run" / "checkpoints" / "step-000002")
    settings = {"rows_per_step": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    resumed = replace(read, ranks=2, progress=replace(read.progress, settings=settings))
    config = TrainConfig(
        model="m", dataset="d", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    kept, line = kept_accumulation(config, ranks, resumed)
    assert kept == expected
    assert line.startswith(f"gradient accumulation: {kept} in place of 3" if kept != accumulation else "")
    assert bool(line) == (kept != accumulation)


def test_the_same_command_keeps_what_an_earlier_restart_changed(first: Path) -> None:
    read = Resumed._of(first / "run" / "checkpoints" / "step-000002")
    settings = {"rows_per_step": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    resumed = replace(read, ranks=1, progress=replace(read.progress, settings=settings))
    config = TrainConfig(model="m", dataset="d", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert kept_accumulation(config, 1, resumed)[0] == 6
    assert kept_accumulation(config, 1, None) == (3, "")
