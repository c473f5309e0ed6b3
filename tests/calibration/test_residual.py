"""Adapters that begin with what rounding left out: their values, and what becomes of them in files of others."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded import generate, merge, quantize, train
from qsharded.calibration.residual import AdapterShape, residual_factors
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.checkpoint.initial_adapter import INITIAL_FILE
from qsharded.data import Tokenizer
from qsharded.nn import PackedLinear
from tests.calibration.cases import inputs, moments, weight
from tests.checkpoints import write_chat_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 200)


def trained(model: Path, rows: Path, output: Path, *more: str, steps: int = 2, rate: str = "1e-3") -> Path:
    train.main([
        *("--model", str(model), "--dataset", str(rows), "--output-dir", str(output), "--max-steps", str(steps)),
        *("--learning-rate", rate, "--dtype", "float32", "--lora-r", "4", "--max-length", "32", "--packing"),
        *("--save-steps", "2", "--logging-steps", "1", "--lr-scheduler-type", "constant", "--lora-init", "residual"),
        *more,
    ])  # fmt: skip
    return output / "adapter"


@pytest.fixture(scope="module")
def adapter(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(model, rows, tmp_path_factory.mktemp("trained") / "out")


def losses(adapter: Path) -> list[float]:
    logged = [json.loads(line) for line in (adapter.parent / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in logged if "loss" in row]


def updates(file: Path, adapter: Path) -> dict[str, Tensor]:
    """What each layer's pair of tensors adds to its weight."""
    tensors, lora = load_file(file), read_lora_config(adapter)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    scaling = lora.lora_alpha / lora.r
    return {
        name.removeprefix("base_model.model.") + ".weight": scaling
        * tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


@pytest.mark.parametrize("r", [4, 40])
def test_the_factors_are_the_best_of_their_rank(r: int) -> None:
    error, x = weight(24, 64).float(), inputs(512, 64)
    L = moments(x).damped("w").factor().float()
    A, B = residual_factors(error, L, AdapterShape(r, scaling=2.0), seed=0)
    assert (A.shape, B.shape) == ((r, 64), (24, r))
    left = ((error - 2.0 * B @ A) @ L).square().sum()
    singular = torch.linalg.svdvals(error @ L)
    assert left.item() == pytest.approx(singular[r:].square().sum().item(), rel=1e-3, abs=1e-4 * singular[0].item())
    torch.testing.assert_close(A, residual_factors(error, L, AdapterShape(r, 2.0), seed=0)[0], rtol=0, atol=0)


def test_training_begins_closer_to_the_model(model: Path, rows: Path, adapter: Path, tmp_path: Path) -> None:
    text = "".join(f"<u>{x * n}<e><a>{x * 3}<e>" for n in (1, 2, 3) for x in "abcde")  # such as the rows have
    ids = torch.tensor([Tokenizer.from_folder(model).encode(text)])
    begun = trained(model, rows, tmp_path / "begun", steps=1, rate="1e-12")
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        plain = load_model(model, dtype=torch.float32, device="cpu").eval()(ids)
        ours = load_model(model, dtype=torch.float32, device="cpu", lora=read_lora_config(begun)).eval()
        load_adapter(ours, begun)
        corrected = ours(ids)
        # PEFT reads it as any adapter
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for name, module in ours.named_modules():
            if isinstance(module, PackedLinear):
                theirs.get_submodule(name.removesuffix(".base_layer")).weight.data = module.dequantize(torch.float32)
        peft = PeftModel.from_pretrained(theirs, begun).eval()(ids).logits
    assert (corrected - exact).norm() < 0.9 * (plain - exact).norm()
    torch.testing.assert_close(peft, corrected, rtol=1e-4, atol=1e-4)


def test_merging_into_16_bits_takes_off_what_it_began_with(model: Path, adapter: Path, tmp_path: Path) -> None:
    merge.main(["--model", str(model), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    original, merged = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "merged"))
    last, first = (updates(adapter / name, adapter) for name in ("adapter_model.safetensors", INITIAL_FILE))
    assert len(last) == 14
    for name, update in last.items():
        assert first[name].norm() > 2 * (update - first[name]).norm()  # or taking it off could not be told
        expected = (original[name].float() + update - first[name]).bfloat16()
        torch.testing.assert_close(merged[name].float(), expected.float(), rtol=1e-2, atol=1e-5)
        assert (merged[name] != expected).double().mean() < 0.01  # sums in another order


def test_merging_into_the_rounded_weights_keeps_all_of_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    base = "--base", "nf4"
    merge.main(["--model", str(model), "--adapter", str(adapter), "--output", str(tmp_path / "merged"), *base])
    ours = load_model(model, dtype=torch.float32, device="cpu")
    merged, last = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        updates(adapter / "adapter_model.safetensors", adapter),
    )
    for name, update in last.items():
        rounded = ours.get_submodule(name.removesuffix(".weight")).dequantize(torch.float32)
        torch.testing.assert_close(merged[name].float(), rounded + update, rtol=1e-2, atol=1e-5)


def test_without_the_file_or_with_another_merging_is_refused(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in adapter.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    flags = ["--model", str(model), "--adapter", str(copied), "--output", str(tmp_path / "merged")]
    raw = bytearray((copied / INITIAL_FILE).read_bytes())
    raw[-1] ^= 1
    (copied / INITIAL_FILE).write_bytes(raw)
    for complaint in (f"{INITIAL_FILE} is damaged, or of another adapter", f"{INITIAL_FILE} is missing"):
        with pytest.raises(SystemExit):
            merge.main(flags)
        assert complaint in capsys.readouterr().err
        (copied / INITIAL_FILE).unlink(missing_ok=True)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(model: Path, rows: Path, tmp_path: Path) -> None:
    whole = trained(model, rows, tmp_path / "whole", steps=4)
    trained(model, rows, tmp_path / "parts", steps=2)
    (tmp_path / "parts" / INITIAL_FILE).unlink()  # the checkpoint has it
    parts = trained(model, rows, tmp_path / "parts", "--resume-from-checkpoint", "auto", steps=4)
    for name in ("adapter_model.safetensors", INITIAL_FILE):
        one, other = load_file(whole / name), load_file(parts / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "parts" / "checkpoints" / "step-000004" / "adapter" / INITIAL_FILE).is_file()
    go_on = ["--adapter", str(parts), "--lora-init", "default"]
    train.main([
        *("--model", str(model), "--dataset", str(rows), "--output-dir", str(tmp_path / "third"), "--max-steps", "1"),
        *("--max-length", "32", "--dtype", "float32", "--save-steps", "0", *go_on),
    ])  # fmt: skip
    assert (tmp_path / "third" / "adapter" / INITIAL_FILE).read_bytes() == (parts / INITIAL_FILE).read_bytes()


@pytest.mark.slow
def test_a_base_that_was_packed_needs_the_weights_in_16_bits(
    model: Path, rows: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    quantize.main(["--model", str(model), "--output", str(packed), "--format", "bitsandbytes"])
    with pytest.raises(SystemExit):
        trained(packed, rows, tmp_path / "refused")
    assert "give --original-model" in capsys.readouterr().err
    again = trained(packed, rows, tmp_path / "out", "--original-model", str(model))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, again))
    for name in one:  # the same rounding, so the same start and training
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_calibrating_before_a_run_is_done_once_and_its_adapter_belongs_to_that_base(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = "--data-cache", str(tmp_path / "cache"), "--calibrate", "8"
    first = trained(model, rows, tmp_path / "first", *cache)
    (folder,) = (tmp_path / "cache").glob("calibrated-*")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    second = trained(model, rows, tmp_path / "second", *cache)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert losses(first) == losses(second)
    generate.main(["--adapter", str(first), "--prompt", "abc", "--max-new-tokens", "2"])  # it names that base
    with pytest.raises(SystemExit):  # the original would be rounded to nearest
        generate.main(["--adapter", str(first), "--model", str(model), "--prompt", "abc", "--max-new-tokens", "2"])
    assert "this base is rounded otherwise (nearest)" in capsys.readouterr().err
    with safe_open(first / "adapter_model.safetensors", "pt") as file:
        assert "compensated" in file.metadata()["qsharded_base"]
    merge.main(["--model", str(model), "--adapter", str(first), "--output", str(tmp_path / "merged")])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--random-init",), "--random-init draws weights"),
        (("--adapter", "x"), "--lora-init residual begins a new adapter"),
        (("--streaming",), "--streaming does not know all rows"),
    ],
)
def test_refusals(
    model: Path, rows: Path, tmp_path: Path, flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        trained(model, rows, tmp_path / "out", *flags)
    assert complaint in capsys.readouterr().err
