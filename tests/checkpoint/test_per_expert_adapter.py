"""Adapters with a tensor for each expert, against what PEFT makes of the same files."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded.merge import MergeConfig, run
from tests.models.parity import assert_close, case, ids, load_folders, round_to_nf4
from tests.models.variants import VARIANTS

R = 3
NAMES = {
    "qwen3_moe": ("mlp", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
    "mixtral": ("block_sparse_moe", {"w1": "gate", "w3": "up", "w2": "down"}),
}


def write(folder: Path, variant: str, parts: list[str], **config: object) -> Path:
    """An adapter on q_proj and on each expert's projections, in the names of transformers 4."""
    shape, (mixture, called) = VARIANTS[variant], NAMES[variant]
    D, J = shape["hidden_size"], shape.get("moe_intermediate_size", shape["intermediate_size"])
    sizes = {"gate": (J, D), "up": (J, D), "down": (D, J)}
    torch.manual_seed(9)
    tensors: dict[str, Tensor] = {}

    def adapt(name: str, N: int, K: int) -> None:
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(R, K)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(N, R)

    for layer in range(shape["num_hidden_layers"]):
        adapt(f"model.layers.{layer}.self_attn.q_proj", shape["num_attention_heads"] * shape.get("head_dim", 16), D)
        for e in range(shape.get("num_experts", shape.get("num_local_experts", 0))):
            for part in parts:
                adapt(f"model.layers.{layer}.{mixture}.experts.{e}.{part}", *sizes[called[part]])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": 5,
        "target_modules": ["q_proj", *parts],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    return folder


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("variant", NAMES)
def test_logits_and_merge_are_those_of_peft(variant: str, rslora: bool, tmp_path: Path) -> None:
    checkpoint = case(variant).checkpoint
    adapter = write(tmp_path / "a", variant, list(NAMES[variant][1]))
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(round_to_nf4(base), adapter)(input_ids=ids()).logits
        plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(input_ids=ids()).logits
        assert_close({"logits": load_folders(checkpoint, adapter)(ids())}, {"logits": expected})
    assert (expected - plain).abs().max() > 0.01
    run(MergeConfig(model=str(checkpoint), adapter=str(adapter), output=str(tmp_path / "m"), base="nf4"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        assert_close({"logits": merged(input_ids=ids()).logits}, {"logits": expected})


def test_gate_alone_is_adapted_alone(tmp_path: Path) -> None:
    """PEFT refuses it; up's part is zero here."""
    checkpoint = case("qwen3_moe").checkpoint
    model = load_folders(checkpoint, write(tmp_path / "a", "qwen3_moe", ["gate_proj"]))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    layer = model.model.layers[1].mlp.experts
    J = VARIANTS["qwen3_moe"]["moe_intermediate_size"]
    delta = layer.product(layer.lora_A.weight, layer.lora_B.weight)
    name = "base_model.model.model.layers.1.mlp.experts.2.gate_proj"
    right = stored[f"{name}.lora_B.weight"] @ stored[f"{name}.lora_A.weight"] * 5 / R
    torch.testing.assert_close(delta[2, :J], right)
    assert not delta[:, J:].any()


def test_an_expert_without_its_adapter_is_told(tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", "qwen3_moe", ["gate_proj", "up_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for end in "AB":
        del tensors[f"base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_{end}.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not every expert has an adapter on .*layers\.0\.mlp\.experts\.gate_up_proj"):
        load_folders(case("qwen3_moe").checkpoint, adapter)


def test_dropout_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = write(tmp_path / "a", "qwen3_moe", ["down_proj"], lora_dropout=0.1)
    load_folders(case("qwen3_moe").checkpoint, adapter)
    assert "lora_dropout = 0.1 is left out" in caplog.text
