"""The quantize command: what it writes is what train and generate read, and it is there whole or not at all."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsharded import generate, train
from qsharded.merge import main as merge
from qsharded.quantize import main
from tests.checkpoints import write_chat_checkpoint, write_chat_rows


@pytest.fixture
def original(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_chat_checkpoint(tmp_path / "model", shards=2)


def quantize(original: Path, output: Path, *more: str) -> Path:
    main(["--model", str(original), "--output", str(output), *more])
    return output


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
def test_it_generates_what_the_original_does(
    original: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = quantize(original, tmp_path / "packed", "--format", form)
    assert files(packed) == files(original) | {"qsharded_base.json"}
    answers = []
    for model in (original, packed):
        generate.main(["--model", str(model), "--prompt", "abc", "--max-new-tokens", "12", "--dtype", "float32"])
        answers.append(capsys.readouterr().out)
    assert answers[0].strip()
    assert answers[1] == answers[0]


def losses(model: Path, rows: Path, output: Path) -> list[float]:
    train.main([
        *("--model", str(model), "--dataset", str(rows), "--output-dir", str(output), "--max-steps", "3"),
        *("--logging-steps", "1", "--save-steps", "0", "--dtype", "float32", "--lora-r", "2"),
    ])  # fmt: skip
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in logged if "loss" in row]


def test_training_on_it_is_training_on_the_original(original: Path, tmp_path: Path) -> None:
    rows = write_chat_rows(tmp_path / "rows.jsonl", 40)
    expected = losses(original, rows, tmp_path / "first")
    packed = quantize(original, tmp_path / "packed")
    assert len(expected) == 3
    assert losses(packed, rows, tmp_path / "second") == expected
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("first", "second")]
    for name, weight in adapters[0].items():
        assert torch.equal(adapters[1][name], weight)


def test_training_on_fp4_is_the_same_from_either_form(original: Path, tmp_path: Path) -> None:
    """And not training on NF4."""
    rows = write_chat_rows(tmp_path / "rows.jsonl", 40)
    found = []
    for form in ("qsharded", "bitsandbytes"):
        kind = ("--quant-type", "fp4", "--block-size", "32", "--format", form)
        found.append(losses(quantize(original, tmp_path / form, *kind), rows, tmp_path / f"run-{form}"))
    assert found[0] == found[1]
    assert len(found[0]) == 3
    assert found[0] != losses(original, rows, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--block-size", "48"), "--block-size must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48"),
        (("--quant-type", "int4"), "--quant-type must be one of nf4, fp4, got 'int4'"),
        (("--block-size", "4096"), "no linear layer was quantized: .* a multiple of 4096"),
    ],
)
def test_kinds_that_cannot_be_written_are_refused(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], complaint: str
) -> None:
    with pytest.raises(SystemExit):
        quantize(original, tmp_path / "packed", *flags)
    assert re.search(complaint, capsys.readouterr().err)
    assert not (tmp_path / "packed").exists()


def test_merging_into_it_is_refused_and_into_the_original_works(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = quantize(original, tmp_path / "packed")
    losses(packed, write_chat_rows(tmp_path / "rows.jsonl", 40), tmp_path / "run")
    arguments = ["--adapter", str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / "merged"), "--base", "nf4"]
    with pytest.raises(SystemExit):
        merge(arguments)  # the adapter names the packed model as its base
    assert "is packed in 4 bits (qsharded)" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    merge([*arguments, "--model", str(original)])
    assert files(tmp_path / "merged") >= files(original)


def test_an_occupied_output_is_refused(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "file").write_text("mine")
    with pytest.raises(SystemExit):
        quantize(original, tmp_path / "packed")
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert files(tmp_path / "packed") == {"file"}


def test_what_fails_leaves_nothing(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = sorted(original.glob("*.safetensors"))[-1]
    weights = load_file(last)
    name = min(weights)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, last)
    with pytest.raises(SystemExit):
        quantize(original, tmp_path / "packed")
    assert f"{name} holds NaN" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_unreadable_quantization_is_refused_before_the_data_is_read(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = json.loads((original / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "awq"}
    (original / "config.json").write_text(json.dumps(described))
    (tmp_path / "rows.jsonl").write_text("no row\n")
    with pytest.raises(SystemExit):
        losses(original, tmp_path / "rows.jsonl", tmp_path / "run")
    assert "quant_method 'awq' is not read here" in capsys.readouterr().err
