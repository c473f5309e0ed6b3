"""Adapters on embeddings as files: ours in PEFT, PEFT's here, merged, continued by the trainer, and looked at."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded import merge, train
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.report import inspect_path
from qsharded.nn import LoRAConfig
from tests.adapters import logits_of, recast, round_to_nf4, transformers_model, with_adapter, write_adapter
from tests.checkpoints import write_chat_checkpoint, write_chat_rows, write_checkpoint
from tests.utils.test_durable_files import room_in_a_file

IDS = torch.arange(48).view(2, 24) * 7 % 97
TARGETS = {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 2}}
WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model.model.embed_tokens."


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    return recast(write_checkpoint(folder, **config), torch.float32)


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_file_says_the_same_here_and_in_peft(tmp_path: Path, tied: bool) -> None:
    """One that PEFT wrote, which brings the embedding it was trained beside, and one of ours."""
    checkpoint = write(tmp_path / "model", tie_word_embeddings=tied)
    theirs = write_adapter(tmp_path / "theirs", checkpoint, **TARGETS)
    assert PREFIX + "base_layer.weight" in load_file(theirs / WEIGHTS)
    config = LoRAConfig(r=4, lora_alpha=12, **TARGETS)
    model = load_model(checkpoint, lora=config, dtype=torch.float32, device="cpu")
    for _, parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, config, tmp_path / "ours", base_model=str(checkpoint))
    assert load_file(tmp_path / "ours" / WEIGHTS)[PREFIX + "lora_embedding_A"].shape == (2, 97)
    said = [logits(round_to_nf4(transformers_model(checkpoint)))]
    for adapter in (theirs, tmp_path / "ours"):
        base = round_to_nf4(transformers_model(checkpoint))
        said.append(logits(PeftModel.from_pretrained(base, adapter)))
        assert torch.equal(logits(with_adapter(checkpoint, adapter)), said[-1])
        assert inspect_path(adapter).problems == []
    assert not torch.equal(said[0], said[1])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_embedding_that_a_file_brings_is_used_as_peft_uses_it(tmp_path: Path, tied: bool) -> None:
    checkpoint = write(tmp_path / "model", tie_word_embeddings=tied)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **TARGETS)
    weights = load_file(adapter / WEIGHTS)
    weights[PREFIX + "base_layer.weight"] *= 1.5
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    expected = logits(PeftModel.from_pretrained(round_to_nf4(transformers_model(checkpoint)), adapter))
    assert torch.equal(logits(with_adapter(checkpoint, adapter)), expected)
    merge.main(["--model", str(checkpoint), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    expected = logits(PeftModel.from_pretrained(transformers_model(checkpoint), adapter))
    torch.testing.assert_close(logits(transformers_model(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)


def test_merging_rounds_the_fp32_sum_once(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_checkpoint(tmp_path / "model")  # in bf16
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **TARGETS)
    merge.main(["--model", str(checkpoint), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    name, weights = "model.embed_tokens.weight", load_file(adapter / WEIGHTS)
    product = (weights[PREFIX + "lora_embedding_B"].float() @ weights[PREFIX + "lora_embedding_A"].float()).T * 12 / 2
    expected = (load_file(checkpoint / "model.safetensors")[name].float() + product).bfloat16()
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[name], expected)


def test_a_merge_that_does_not_fit_names_the_bytes_of_the_file_with_the_head_that_unties(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path / "model", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **TARGETS)
    merged = ["--model", str(checkpoint), "--adapter", str(adapter), "--output"]
    merge.main([*merged, str(tmp_path / "merged")])
    needed = (tmp_path / "merged" / "model.safetensors").stat().st_size
    with pytest.raises(SystemExit), room_in_a_file(20_000):
        merge.main([*merged, str(tmp_path / "full")])
    assert f"model.safetensors was not written: File too large; it takes {needed:,} bytes" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("part", ["A", "B"])
def test_inspect_finds_half_an_adapter(tmp_path: Path, part: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", write(tmp_path / "model"), **TARGETS)
    weights = load_file(adapter / WEIGHTS)
    other = "B" if part == "A" else "A"
    save_file({n: w for n, w in weights.items() if n != f"{PREFIX}lora_embedding_{part}"}, adapter / WEIGHTS)
    expected = f"{PREFIX}lora_embedding_{other} has no lora_embedding_{part} beside it"
    assert inspect_path(adapter).problems == [expected]


def test_the_trainer_trains_resumes_and_goes_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model, rows = write_chat_checkpoint(tmp_path / "model"), write_chat_rows(tmp_path / "rows.jsonl", 40)
    flags = ["--model", str(model), "--dataset", str(rows), "--logging-steps", "1", "--lora-r", "2"]
    flags += ["--dtype", "float32", "--lora-target-modules", "q_proj,embed_tokens"]
    rate = ["--learning-rate", "0.01"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train.main([*flags, *rate, "--output-dir", str(whole), "--max-steps", "4", "--save-steps", "2"])
    trained = load_file(whole / "adapter" / WEIGHTS)
    assert trained[PREFIX + "lora_embedding_A"].abs().max() > 0  # zeros at the start
    said = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q_proj", "embed_tokens"]
    second = ["--resume-from-checkpoint", str(whole / "checkpoints" / "step-000002")]
    train.main([*flags, *rate, "--output-dir", str(part), "--max-steps", "4", "--save-steps", "0", *second])
    resumed = load_file(part / "adapter" / WEIGHTS)
    assert all(torch.equal(resumed[name], weight) for name, weight in trained.items())
    flags = [flag for flag in flags if flag not in ("--lora-target-modules", "q_proj,embed_tokens")]
    on = [*flags, "--adapter", str(whole / "adapter"), "--output-dir", str(tmp_path / "on"), "--max-steps", "1"]
    train.main([*on, "--learning-rate", "1e-9"])
    went_on = load_file(tmp_path / "on" / "adapter" / WEIGHTS)
    for name, weight in trained.items():
        torch.testing.assert_close(went_on[name], weight, rtol=0, atol=1e-6)  # a step of 1e-9


def test_the_trainer_refuses_a_misspelt_target_before_it_writes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    model, rows = write_chat_checkpoint(tmp_path / "model"), write_chat_rows(tmp_path / "rows.jsonl", 4)
    flags = ["--model", str(model), "--dataset", str(rows), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        train.main([*flags, "--lora-target-modules", "q_proj,w_proj"])
    told = capsys.readouterr().err
    assert "'w_proj'" in told
    assert "v_proj" in told
    assert not (tmp_path / "out" / "adapter").exists()
