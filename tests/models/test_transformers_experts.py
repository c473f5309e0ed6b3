"""Mixtures that transformers' code computes, with our experts: their bytes, adapters, merge, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import peft_config
from qsharded.checkpoint.expert_fills import packed_experts_in
from qsharded.checkpoint.load import skeleton
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.report import inspect_path
from qsharded.lora.layer import lora_layers
from qsharded.merge import MergeConfig
from qsharded.merge import run as merge
from qsharded.models.choice import read_config
from qsharded.nn import LoRAConfig
from qsharded.quant import formats
from tests.models.architectures import (
    LORA,
    assert_parity,
    computed_by_peft,
    described_by,
    documents,
    matrices_of,
    packed_weights,
    write_architecture,
    write_random_adapter,
)

SLOW_ONES = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("granitemoe", "gpt_oss", "mixtral", "ernie4_5_moe")
]
MIXTURES = ["olmoe", *SLOW_ONES]  # apart; joined; turned around with biases; under other names; with a shared expert


def loaded(folder: Path, lora: LoRAConfig | None = None) -> Any:
    return load_model(folder, lora=lora, dtype=torch.float32, device="cpu", model_code="transformers")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_an_experts_bytes_are_those_of_its_matrix(model_type: str, tmp_path: Path) -> None:
    folder = write_architecture(tmp_path, model_type)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, experts = loaded(folder), 0
    for name, packed in packed_experts_in(model):
        parent, _, part = name.rpartition(".")
        for e, matrix in enumerate(matrices_of(theirs.get_submodule(parent), part)):
            alone, found = formats.quantize(matrix.contiguous()), packed.packed().expert(e)
            assert found.codes.equal(alone.codes)
            assert found.absmax.equal(alone.absmax_codes)
            assert found.absmax_scales.equal(alone.absmax_scales)
            assert found.absmax_offset.equal(alone.absmax_offset)
            experts += 1
    assert experts == 4 * 3 * (1 if model_type == "ernie4_5_moe" else 2)  # its first layer is dense


@pytest.mark.parametrize("base", ["nf4", pytest.param("16bit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_files_are_sound_and_a_merge_computes_what_peft_does(model_type: str, base: Any, tmp_path: Path) -> None:
    folder, adapter = write_architecture(tmp_path / "base", model_type), tmp_path / "adapter"
    model = loaded(folder, LORA)
    write_random_adapter(model, adapter)
    packed = tmp_path / "packed"
    packed.mkdir()
    quantize_checkpoint(folder, packed, "qsharded", torch.device("cpu"))
    assert [inspect_path(path).problems for path in (folder, adapter, packed)] == [[], [], []]
    rows = [[torch.cat(row)] for row in documents(packed=False)]
    merge(MergeConfig(model=str(folder), adapter=str(adapter), output=str(tmp_path / "merged"), base=base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    rounded = packed_weights(model) if base == "nf4" else set[str]()
    expected = computed_by_peft(folder, adapter, rounded, rows)[0]
    with torch.no_grad():
        assert_parity(merged(torch.stack([row for [row] in rows])).logits, expected, "logits")


def outline(model_type: str, lora: LoRAConfig) -> Any:
    return skeleton(read_config(described_by(model_type), "transformers"), lora, torch.bfloat16)


def test_all_linear_is_attention_shared_experts_and_experts_but_never_the_router() -> None:
    model = outline("deepseek_v3", LORA)
    of_mixture = {name.partition("layers.1.mlp.")[2] for name, _ in lora_layers(model) if "layers.1.mlp." in name}
    shared = {f"shared_experts.{part}_proj" for part in ("gate", "up", "down")}
    assert of_mixture == shared | {"experts", "experts.base_layer"}


def test_one_parameter_of_experts_can_be_named() -> None:
    lora = LoRAConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    said = peft_config(outline("olmoe", lora), lora, "m")
    assert said["target_parameters"] == ["mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=r"no parameter matches target_parameters = 'experts\.up_proj'; there are"):
        outline("olmoe", LoRAConfig(target_modules=["q_proj"], target_parameters=["experts.up_proj"]))


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lora_dropout = 0\.1: adapters on experts \(model\.layers\.0\."):
        outline("olmoe", LoRAConfig(lora_dropout=0.1))


def test_experts_of_another_layout_are_not_adapted_and_not_found_by_name() -> None:
    assert not any(name.endswith("experts") for name, _ in lora_layers(outline("llama4_text", LORA)))
    with pytest.raises(ValueError, match=r"no parameter matches target_parameters = 'experts\.down_proj'"):
        outline("llama4_text", LoRAConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
