"""Adapters that PEFT writes with settings that choose layers, with frozen weights beside them, and pickled; PEFT is the
reference."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded import merge, train
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import read_lora_config, save_adapter
from qsharded.lora.layer import lora_layers
from qsharded.nn import LoRAConfig
from tests.adapters import logits_of, recast, round_to_nf4, transformers_model, with_adapter, write_adapter
from tests.checkpoints import write_chat_checkpoint, write_chat_rows, write_checkpoint

IDS = torch.arange(24).view(2, 12) * 7 % 97
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, EMBEDDING = "base_model.model.lm_head.", "base_model.model.model.embed_tokens."
CHOICES: list[dict[str, Any]] = [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0, 1, 5]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [0], "target_modules": ["q_proj", "lm_head"]},  # a whole name stays
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": ["layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]},
    {"exclude_modules": r".*\.layers\.1\..*"},
    {"exclude_modules": ["mlp.down_proj"], "layers_to_transform": [1]},
    {"exclude_modules": ["lm_head"], "target_modules": r".*(q_proj|lm_head)"},
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return recast(write_checkpoint(tmp_path / "model"), torch.float32)


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS)


def by_peft(checkpoint: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(round_to_nf4(transformers_model(checkpoint)), adapter))


def edit(adapter: Path, **tensors: Any) -> None:
    """Replace tensors of an adapter's file."""
    weights = load_file(adapter / WEIGHTS)
    save_file(weights | tensors, adapter / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_settings_that_choose_layers_are_read_and_written_as_peft_means_them(
    tmp_path: Path, checkpoint: Path, choice: dict[str, Any]
) -> None:
    theirs = write_adapter(tmp_path / "theirs", checkpoint, **choice)
    model = with_adapter(checkpoint, theirs)
    assert torch.equal(logits(model), by_peft(checkpoint, theirs))
    save_adapter(model, read_lora_config(theirs), tmp_path / "ours", base_model=str(checkpoint))
    assert torch.equal(by_peft(checkpoint, tmp_path / "ours"), logits(model))
    again = json.loads((tmp_path / "ours" / CONFIG).read_text())
    for name in ("layers_to_transform", "exclude_modules"):
        said = choice.get(name)
        written = again[name] if isinstance(again[name], str) else sorted(again[name] or []) or None
        assert written == ([said] if isinstance(said, int) else said)


def test_layers_of_all_linear_are_chosen_as_peft_chooses_those_of_its_names(checkpoint: Path) -> None:
    choice: dict[str, Any] = {"layers_to_transform": [1], "exclude_modules": ["mlp.up_proj"]}
    ours = load_model(checkpoint, lora=LoRAConfig(r=2, **choice), dtype=torch.float32)
    every = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    theirs = get_peft_model(transformers_model(checkpoint), LoraConfig(r=2, target_modules=every, **choice))
    adapted = {name for name, part in theirs.named_modules() if hasattr(part, "lora_A")}
    assert {f"base_model.model.{name}" for name, _ in lora_layers(ours)} == adapted
    assert len(adapted) == 6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_frozen_ends_that_a_file_brings_are_used_as_in_peft_and_told_if_they_are_others(
    tmp_path: Path, tied: bool, other: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model", tie_word_embeddings=tied), torch.float32)
    model = get_peft_model(transformers_model(checkpoint), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    brought = load_file(tmp_path / "adapter" / WEIGHTS)
    assert EMBEDDING + "weight" in brought
    if other:
        ends = {
            name: weight * 1.5 for name, weight in brought.items() if name in (EMBEDDING + "weight", HEAD + "weight")
        }
        edit(tmp_path / "adapter", **ends)
    expected = by_peft(checkpoint, tmp_path / "adapter")
    caplog.set_level(logging.INFO)
    assert torch.equal(logits(with_adapter(checkpoint, tmp_path / "adapter")), expected)
    assert ("brings another base_model.model.model.embed_tokens.weight than the base" in caplog.text) == other
    caplog.clear()
    merged = ["--model", str(checkpoint), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    merge.main(merged)
    assert ("brings another" in caplog.text) == other
    whole = PeftModel.from_pretrained(transformers_model(checkpoint), tmp_path / "adapter")
    torch.testing.assert_close(logits(transformers_model(tmp_path / "merged")), logits(whole), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_an_adapted_head_is_read_with_the_weight_that_it_brings_and_merged(
    tmp_path: Path, tied: bool, other: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model", tie_word_embeddings=tied), torch.float32)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, target_modules=["q_proj", "lm_head"])
    name = HEAD + "base_layer.weight"
    if other:
        edit(adapter, **{name: load_file(adapter / WEIGHTS)[name] * 1.5})
    caplog.set_level(logging.INFO)
    assert torch.equal(logits(with_adapter(checkpoint, adapter)), by_peft(checkpoint, adapter))
    assert (f"{adapter / WEIGHTS} brings another {name} than the base model's" in caplog.text) == other
    merge.main(["--model", str(checkpoint), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    whole = logits(PeftModel.from_pretrained(transformers_model(checkpoint), adapter))
    # Base and update are summed before the product, not after: fp32's rounding.
    torch.testing.assert_close(logits(transformers_model(tmp_path / "merged")), whole, rtol=1e-4, atol=1e-4)
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_trainer_trains_a_head_and_peft_reads_it(tmp_path: Path, tied: bool) -> None:
    (tmp_path / "model").mkdir()
    model = recast(write_chat_checkpoint(tmp_path / "model"), torch.float32)
    described = json.loads((model / "config.json").read_text())
    if tied:
        weights = load_file(model / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": tied}))
    rows = write_chat_rows(tmp_path / "rows.jsonl", 8)
    flags = ["--model", str(model), "--dataset", str(rows), "--output-dir", str(tmp_path / "out"), "--max-steps", "2"]
    train.main([*flags, "--lora-target-modules", "q_proj,lm_head", "--learning-rate", "0.01", "--dtype", "float32"])
    adapter = tmp_path / "out" / "adapter"
    assert load_file(adapter / WEIGHTS)[HEAD + "lora_B.weight"].abs().max() > 0
    assert torch.equal(logits(with_adapter(model, adapter)), by_peft(model, adapter))
    resumed = ["--resume-from-checkpoint", "auto", "--max-steps", "3"]
    train.main([*flags[:6], *resumed, "--lora-target-modules", "q_proj,lm_head", "--dtype", "float32"])


def test_a_pickled_adapter_is_named_with_a_command_that_converts_it(tmp_path: Path, checkpoint: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    expected = by_peft(checkpoint, adapter)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is pickled, which is not read") as raised:
        with_adapter(checkpoint, adapter)
    command = str(raised.value).split("python -c ")[1].strip('"')
    subprocess.run([sys.executable, "-c", command], cwd=adapter, check=True)
    assert torch.equal(logits(with_adapter(checkpoint, adapter)), expected)
