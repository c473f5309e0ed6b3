"""``--dry-run`` from the command line: what it prints, what it needs, when it fails."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import train
from qsharded.checkpoint.packed_format import own_config
from qsharded.quant.formats import QuantFormat, dequantize_workspace
from qsharded.utils.cards import CARDS
from tests.checkpoints import LLAMA, pack_by_bitsandbytes, write_checkpoint

SHAPE = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "vocab_size": 32000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """config.json alone: neither weights nor a tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], model: Path, *flags: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leave:
        train.main(["--model", str(model), "--dry-run", *flags])
    return leave.value.code, capsys.readouterr().out


def figure(text: str, name: str) -> float:
    found = re.search(rf"^  {name} +([\d.]+)", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_classes_are_printed_in_gib(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, text = printed(capsys, model, "--gpus", "2", "--gpu-memory-gib", "80")
    assert status == 0
    weights = 8 * (2 * 4096 * 4096 + 2 * 4096 * 2048 + 3 * 4096 * 14336)
    assert figure(text, "codes") == pytest.approx(weights / 2 / 2 / 2**30, abs=6e-4)
    assert figure(text, "embedding and head") == pytest.approx(2 * 32000 * 4096 * 2 / 2 / 2**30, abs=6e-4)
    assert figure(text, "layer's work") > 2 * 4096 * 14336 * 2 / 2**30  # gate and up, dequantized
    assert "verdict: fits" in text
    assert "host memory of a rank" in text
    assert figure(text, "adapter") > 0


def test_what_does_not_fit_is_told_with_settings_that_do(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    crowded = ["--per-device-train-batch-size", "8", "--activation-checkpointing", "none", "--gpus", "1"]
    status, text = printed(capsys, model, *crowded, "--gpu-memory-gib", "16")
    assert status == 1
    assert "verdict: DOES NOT FIT" in text
    suggested = text.partition("what fits, one of:\n")[2].partition("\n\n")[0].splitlines()
    assert suggested[0].startswith("  --activation-checkpointing selective: needs ")
    needs = [float(re.search(r"needs ([\d.]+) GiB", line)[1]) for line in suggested]
    assert all(need <= 16 for need in needs)
    # the flags as they stand, in place of those that did not fit
    again = ["--per-device-train-batch-size", "8", "--gpus", "1", "--gpu-memory-gib", "16"]
    again += ["--activation-checkpointing", "selective"]
    status, text = printed(capsys, model, *again)
    assert status == 0
    assert f"needs {figure(text, 'needed'):.1f} GiB" in suggested[0]


def test_no_gpu_known_is_no_failure(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, text = printed(capsys, model)
    assert status == 0
    assert "on 1 GPU," in text
    assert "--gpu-memory-gib says" in text


def test_torchruns_ranks_are_planned_for_and_one_prints(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert "on 3 GPUs" in printed(capsys, model)[1]
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys, model)[1] == ""


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as leave:
        train.main(["--model", str(tmp_path), "--dry-run"])
    assert leave.value.code == 1
    assert "config.json is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--model", str(tmp_path), "--dataset", "d", "--gpus", "2"])
    assert "--gpus: for `qsharded plan` (--dry-run) alone" in capsys.readouterr().err


def test_a_folder_of_bitsandbytes_is_planned_with_the_blocks_that_it_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """config.json does not say their size."""
    original = write_checkpoint(tmp_path, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1)
    scales = []
    for block_size in (64, 128):
        folder = pack_by_bitsandbytes(original, tmp_path / str(block_size), "fp4", block_size, False)
        scales.append(figure(printed(capsys, folder, "--gpus", "1", "--gpu-memory-gib", "1")[1], "scales"))
    assert scales == [pytest.approx(5.5 * 2**20 / size * 4 / 2**30, abs=6e-4) for size in (64, 128)]


def test_a_model_that_only_blocks_of_32_fit_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 160}
    original = write_checkpoint(tmp_path, **sizes)
    folder = pack_by_bitsandbytes(original, tmp_path / "packed", "fp4", 32, False)
    assert printed(capsys, folder, "--gpus", "1", "--gpu-memory-gib", "80")[0] == 0


def test_the_work_of_dequantizing_other_blocks_is_planned(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    def work(kind: QuantFormat) -> float:
        (model / "config.json").write_text(json.dumps(SHAPE | {"quantization_config": own_config(kind)}))
        flags = ["--gpus", "1", "--gpu-memory-gib", "80", "--per-device-train-batch-size", "1", "--max-length", "16"]
        return figure(printed(capsys, model, *flags)[1], "layer's work") * 2**30

    weight, of_kernels, of_pytorch = 4096 * 14336, work(QuantFormat("fp4", 64)), work(QuantFormat("fp4", 128))
    # gate and up in 16 bits, with their adapters' columns; so few tokens are little beside them
    assert of_kernels == pytest.approx(2 * weight * 2, rel=0.05)
    # one of them is dequantized apart: in 16 bits, and in fp32 the codebook's values of some rows with their products
    apart = weight * 2 + dequantize_workspace(14336, 4096)
    assert of_pytorch == pytest.approx(2 * weight * 2 + apart, rel=0.05)


def test_packed_checkpoints_are_planned_as_they_are_packed(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    def packed_by(**said: Any) -> tuple[int, str]:
        (model / "config.json").write_text(json.dumps(SHAPE | {"quantization_config": said}))
        return printed(capsys, model, "--gpus", "1", "--gpu-memory-gib", "80")

    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    weights = 8 * (2 * 4096 * 4096 + 2 * 4096 * 2048 + 3 * 4096 * 14336)
    status, text = packed_by(**nf4)
    assert status == 0
    assert figure(text, "scales") == pytest.approx(weights / 64 * 4 / 2**30, abs=6e-4)
    assert figure(packed_by(**nf4, bnb_4bit_use_double_quant=True)[1], "scales") < figure(text, "scales") / 3.8
    ours = own_config(QuantFormat("fp4", 256)) | {"double_quant": False}
    assert figure(packed_by(**ours)[1], "scales") == pytest.approx(weights / 256 * 4 / 2**30, abs=6e-4)
    packed_by(**nf4)
    with pytest.raises(SystemExit):
        train.main(["--model", str(model), "--dry-run", "--lora-modules-to-save", "up_proj"])
    assert "up_proj is packed in this checkpoint" in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(SHAPE | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SystemExit):
        train.main(["--model", str(model), "--dry-run"])
    assert "quant_method 'gptq' is not read here" in capsys.readouterr().err


def test_the_verdict_comes_first_and_what_would_fit_behind_it(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    fitting = printed(capsys, model, "--gpus", "1", "--gpu-memory-gib", "80")[1]
    assert fitting.startswith("verdict: fits, ")
    crowded = ["--gpus", "1", "--gpu-memory-gib", "16", "--activation-checkpointing", "none"]
    text = printed(capsys, model, *crowded, "--per-device-train-batch-size", "8")[1]
    assert text.startswith("verdict: DOES NOT FIT, ")
    assert text.splitlines()[1] == "what fits, one of:"


def test_the_host_is_counted_with_all_its_ranks(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    flags = ["--gpus", "4", "--gpu-memory-gib", "80", "--activation-checkpointing", "full", "--cpu-offload"]
    status, text = printed(capsys, model, *flags, "--host-memory-gib", "64")
    needed = float(re.search(r"([\d.]+) of 64\.0 GiB of the host", text)[1])
    # what loading takes beside the weights is given back before the checkpoint's copy is made
    kept, copy = figure(text, "interpreter") + figure(text, "frozen weights"), figure(text, "checkpoint's copy")
    assert needed == pytest.approx(4 * (kept + max(figure(text, "reading the checkpoint"), copy)), abs=0.06)
    assert (status, text[:13]) == (0, "verdict: fits")
    status, text = printed(capsys, model, *flags, "--host-memory-gib", f"{needed - 1:.1f}")
    assert (status, text[:21]) == (1, "verdict: DOES NOT FIT")
    assert text.splitlines()[1] == "the host needs less without --cpu-offload, with fewer ranks on it"
    one_plain = ["--gpus", "1", "--gpu-memory-gib", "80", "--host-memory-gib", "2"]
    assert printed(capsys, model, *one_plain)[1].splitlines()[1] == "it takes a host with more memory"
    # of another machine's host nothing is known, so that it is asked for
    status, text = printed(capsys, model, *flags)
    assert status == 0
    assert f"{needed:.1f} GiB of the host (--host-memory-gib says how much there is)" in text.splitlines()[0]


def test_parameters_tokens_and_the_estimate_are_told(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    flags = ["--gpus", "2", "--max-length", "512", "--gradient-accumulation-steps", "3", "--lora-r", "8"]
    text = printed(capsys, model, *flags, "--gpu", "H100", "--max-steps", "700000")[1]
    kv = SHAPE["num_key_value_heads"] * 4096 // SHAPE["num_attention_heads"]
    layer = 2 * 4096 * 4096 + 2 * 4096 * kv + 3 * 4096 * 14336
    norms, ends = 8 * 2 * 4096 + 4096, 2 * 32000 * 4096
    adapters = 8 * 8 * (2 * (4096 + 4096) + 2 * (4096 + kv) + 3 * (4096 + 14336))
    assert f"parameters: {8 * layer + norms + ends:,} frozen, {adapters:,} trained" in text
    tokens = 2 * 4 * 3 * 512
    assert f"tokens of an optimizer step: {tokens:,}, " in text
    found = re.search(r"estimate, not measured: ([\d,]+) tokens/s in all; 700,000 steps take ([\d.]+) hours", text)
    speed, hours = float(found[1].replace(",", "")), float(found[2])
    assert hours == pytest.approx(700_000 * tokens / speed / 3600, rel=0.01)
    assert "of 79.1 GiB" in text.splitlines()[0]
    few = printed(capsys, model, *flags, "--gpu", "H100", "--max-steps", "7000")[1]
    assert f"7,000 steps take {7000 * tokens / speed / 60:.0f} minutes" in few
    assert "estimate" not in printed(capsys, model, *flags, "--gpu-memory-gib", "80")[1]


def test_every_row_is_explained(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    text = printed(capsys, model, "--gpus", "2", "--gpu-memory-gib", "80")[1]
    table = text.partition("GPU memory of a rank, GiB\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) > 10
    assert all(re.search(r"\d\.\d{3}  \S", line) for line in table), table


def test_a_sweep_says_which_cards_how_many_and_how_long_a_row(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    limit = 8192
    (model / "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": limit}))
    text = printed(capsys, model, "--gpus", "1", "--gpu", "RTX4090", "--sweep")[1]
    rows = re.findall(r"^  (\S+) +(\d) +(\d+) +[\d.]+ +[\d,]+$", text, re.MULTILINE)
    found = {(card, int(gpus)): int(length) for card, gpus, length in rows}
    assert len(found) == 16
    assert set(found.values()) == {limit}  # a small model


def test_the_longest_row_of_a_sweep_is_the_last_that_the_card_holds(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 1, "max_position_embeddings": 4096}))
    flags = ["--gpus", "1", "--gpu", "H200", "--per-device-train-batch-size", "1", "--activation-checkpointing", "full"]
    needed = figure(printed(capsys, model, *flags, "--max-length", "2048")[1], "needed")
    for memory, longest in ((needed + 0.001, 2048), (needed - 0.001, 1024)):
        monkeypatch.setitem(CARDS, "RTX4090", replace(CARDS["RTX4090"], memory_gib=memory))
        text = printed(capsys, model, *flags, "--sweep")[1]
        assert int(re.search(r"^  RTX4090 +1 +(\d+) ", text, re.MULTILINE)[1]) == longest


def test_a_plan_of_a_hub_id_downloads_no_weights(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert printed(capsys, Path("owner/name"), "--gpus", "1", "--gpu-memory-gib", "80")[0] == 0
    assert "config.json" in asked or "*.json" in asked
    assert not any("safetensors" in pattern and "index" not in pattern for pattern in asked)
