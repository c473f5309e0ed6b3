"""Adapters on experts: what PEFT reads of ours, what is refused, and where all-linear puts them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, peft_config, read_lora_config, save_adapter, trainable
from qsharded.checkpoint.load import skeleton
from qsharded.lora.experts import LoRAExperts
from qsharded.lora.layer import lora_layers
from qsharded.merge import MergeConfig
from qsharded.merge import run as merge
from qsharded.models import ModelConfig
from qsharded.nn import LoRAConfig, adapters_disabled
from tests.models.parity import assert_close, case, ids, results, round_to_nf4
from tests.models.variants import VARIANTS

MIXTURES = [
    "qwen3_moe-v4",
    "mixtral",
    "glm4_moe",
    "gpt_oss",
    "deepseek_v3",
    pytest.param("qwen3_next", marks=pytest.mark.slow),
]


def adapted(variant: str, lora: LoRAConfig) -> Any:
    model = load_model(case(variant).checkpoint, lora=lora, dtype=torch.float32, device="cpu")
    torch.manual_seed(7)
    for name, parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1 if "lora_A" in name else 0.05)
    return model


@pytest.mark.parametrize("variant", MIXTURES)
def test_peft_reads_an_adapter_of_all_linear_layers(variant: str, tmp_path: Path) -> None:
    lora = LoRAConfig(r=3, lora_alpha=5, rank_pattern={"down_proj": 2, "experts.gate_up_proj": 4})
    model = adapted(variant, lora)
    save_adapter(model, lora, tmp_path, base_model="m")
    base = AutoModelForCausalLM.from_pretrained(case(variant).checkpoint, dtype=torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it misses
        theirs = PeftModel.from_pretrained(round_to_nf4(base), tmp_path)(input_ids=ids()).logits
        assert_close({"logits": model(ids())}, {"logits": theirs})
    again = load_model(case(variant).checkpoint, lora=read_lora_config(tmp_path), dtype=torch.float32, device="cpu")
    load_adapter(again, tmp_path)
    assert_close(results(again), results(model))


def outline(variant: str, lora: LoRAConfig) -> Any:
    return skeleton(ModelConfig.from_hf(VARIANTS[variant]), lora, torch.bfloat16)


LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


@pytest.mark.parametrize(
    ("variant", "attends"), [("glm4_moe", {f"{part}_proj" for part in "qkvo"}), ("deepseek_v3", LATENT)]
)
def test_all_linear_is_attention_shared_experts_and_experts_but_never_the_router(
    variant: str, attends: set[str]
) -> None:
    model = outline(variant, LoRAConfig())
    of_last = {name.partition("layers.1.")[2] for name, _ in lora_layers(model) if "layers.1." in name}
    attention = {f"self_attn.{name}" for name in attends}
    shared = {f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
    assert of_last == attention | shared | {"mlp.experts", "mlp.experts.base_layer"}
    assert not model.model.layers[1].mlp.gate.weight.requires_grad


@pytest.mark.parametrize(
    ("lora", "written"),
    [
        (LoRAConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), ["mlp.experts.down_proj"]),
        (LoRAConfig(target_modules=["q_proj"]), None),
        (
            LoRAConfig(layers_to_transform=[1]),
            ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"],
        ),
    ],
)
def test_which_parameters_are_adapted_and_written(lora: LoRAConfig, written: list[str] | None) -> None:
    model = outline("qwen3_moe", lora)
    assert peft_config(model, lora, "m")["target_parameters"] == written
    assert any(isinstance(layer, LoRAExperts) for _, layer in lora_layers(model)) == (written is not None)


@pytest.mark.parametrize(("variant", "routed"), [("qwen3_moe", 2), ("deepseek_v3", 1)])
def test_the_router_trains_in_full_when_it_is_told(variant: str, routed: int, tmp_path: Path) -> None:
    """A correction bias does not, but PEFT wants it in the file, and its own may be another than the base's."""
    lora = LoRAConfig(target_modules=["o_proj"], modules_to_save=["mlp.gate"])
    model = adapted(variant, lora)
    routers = [name for name, _ in trainable(model) if ".mlp.gate." in name]
    assert len(routers) == routed
    assert all(results(model)[name].abs().max() > 0 for name in routers)
    save_adapter(model, lora, tmp_path, base_model="m")
    base = AutoModelForCausalLM.from_pretrained(case(variant).checkpoint, dtype=torch.float32)
    peft = PeftModel.from_pretrained(round_to_nf4(base), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert_close({"logits": model(ids())}, {"logits": peft(input_ids=ids()).logits})
        for name, buffer in peft.named_buffers():
            if ".modules_to_save." in name:
                buffer.add_(torch.linspace(-1, 1, len(buffer)))
        peft.save_pretrained(tmp_path / "again")
        theirs = peft(input_ids=ids()).logits
        assert not theirs.equal(model(ids())) or variant == "qwen3_moe"
        load_adapter(model, tmp_path / "again")
        assert_close({"logits": model(ids())}, {"logits": theirs})
    options = {"adapter": str(tmp_path / "again"), "output": str(tmp_path / "merged"), "check_rows": 0}
    merge(MergeConfig(model=str(case(variant).checkpoint), **options))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    saved = {name: tensor for name, tensor in peft.state_dict().items() if ".modules_to_save." in name}
    for name, tensor in saved.items():
        there = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        assert merged[there].equal(tensor)


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"lora_dropout = 0\.1: adapters on experts \(model\.layers\.0\.mlp\.experts\)"
    ):
        outline("qwen3_moe", LoRAConfig(lora_dropout=0.1))
    outline("qwen3_moe", LoRAConfig(lora_dropout=0.1, target_modules=["q_proj"]))


def test_a_parameter_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no parameter matches target_parameters = 'experts\.up_proj'; there are"):
        outline("qwen3_moe", LoRAConfig(target_parameters=["experts.up_proj"]))


def test_without_adapters_the_model_is_as_it_was() -> None:
    model = adapted("qwen3_moe", LoRAConfig(r=2))
    plain = load_model(case("qwen3_moe").checkpoint, dtype=torch.float32, device="cpu")
    with adapters_disabled(model):
        inside = model(ids())
    with torch.no_grad():
        assert inside.equal(plain(ids()))
        assert not model(ids()).equal(inside)


def test_ranks_below_eight_are_filled_up_in_16_bits() -> None:
    model = adapted("qwen3_moe", LoRAConfig(r=3))
    layer = next(layer for _, layer in lora_layers(model) if isinstance(layer, LoRAExperts))
    wide, exact = layer.update(torch.bfloat16), layer.update(torch.float32)
    assert (wide.A.shape[1], wide.B.shape[2], exact.A.shape[1]) == (8, 8, 3)
    assert (wide.B @ wide.A).float().allclose(exact.B @ exact.A, atol=0.02)


@pytest.mark.parametrize("entry", ["mlp.experts", "mlp.experts.down_proj", "mlp"])
def test_experts_are_not_trained_in_full(entry: str) -> None:
    """Their product has no gradient for the matrices."""
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.{entry} has experts, whose matrices stay frozen"):
        outline("qwen3_moe", LoRAConfig(target_modules=["q_proj"], modules_to_save=[entry]))
