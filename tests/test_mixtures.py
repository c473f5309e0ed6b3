"""The commands on mixtures of experts: quantize, inspect, merge, a plan."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsharded import quantize
from qsharded.checkpoint.expert_fills import experts_in
from qsharded.checkpoint.report import inspect_path
from qsharded.distributed.world import World
from qsharded.merge import MergeConfig
from qsharded.merge import run as merge
from tests.checkpoint.test_expert_layouts import in_mxfp4, rewritten
from tests.models.parity import case, load, load_folders, results

MIXTURES = [
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "glm4_moe")),
]


def packed(checkpoint: Path, target: Path, form: str = "qsharded") -> Path:
    config = quantize.QuantizeConfig(model=str(checkpoint), output=str(target), format=form)
    quantize.run(config, World.single_process(torch.device("cpu")))
    return target


@pytest.mark.parametrize("variant", MIXTURES)
def test_a_packed_checkpoint_computes_as_the_original_to_the_last_bit(variant: str, tmp_path: Path) -> None:
    folders = case(variant)
    again = load_folders(packed(folders.checkpoint, tmp_path / "p"), folders.adapter)
    for name, value in results(load(variant)).items():
        assert results(again)[name].equal(value), name
    for _, experts in experts_in(again):
        assert experts.weight.dtype == torch.bfloat16
    assert inspect_path(tmp_path / "p").problems == []
    assert inspect_path(folders.checkpoint).problems == []
    assert inspect_path(folders.adapter).problems == []
    stored = load_file(tmp_path / "p" / "model.safetensors")
    assert not any(".experts." in name and "bias" not in name and "_proj.weight" not in name for name in stored)


def test_mxfp4_is_packed_and_sound(tmp_path: Path) -> None:
    checkpoint = case("gpt_oss").checkpoint
    blocks, values = in_mxfp4(load_file(checkpoint / "model.safetensors"))
    said = {"quantization_config": {"quant_method": "mxfp4"}}
    in_blocks = rewritten(tmp_path / "mxfp4", checkpoint, blocks, **said)
    assert inspect_path(in_blocks).problems == []
    of_blocks = load_file(packed(in_blocks, tmp_path / "a") / "model.safetensors")
    of_values = load_file(
        packed(rewritten(tmp_path / "bf16", checkpoint, values), tmp_path / "b") / "model.safetensors"
    )
    assert of_blocks.keys() == of_values.keys()
    assert all(tensor.equal(of_values[name]) for name, tensor in of_blocks.items())


def test_a_merge_into_mxfp4_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = case("gpt_oss").checkpoint
    blocks, _ = in_mxfp4(load_file(checkpoint / "model.safetensors"))
    base = rewritten(tmp_path / "m", checkpoint, blocks, quantization_config={"quant_method": "mxfp4"})
    options = MergeConfig(model=str(base), adapter=str(case("gpt_oss").adapter), output=str(tmp_path / "o"))
    with pytest.raises(ValueError, match="has experts in MXFP4, to which merged weights would be rounded again"):
        merge(options)


def test_bitsandbytes_form_does_not_hold_experts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a mixture of experts, which bitsandbytes's form does not hold"):
        packed(case("mixtral").checkpoint, tmp_path / "p", "bitsandbytes")


def test_inspect_names_what_of_packed_experts_is_wrong(tmp_path: Path) -> None:
    checkpoint = packed(case("qwen3_moe").checkpoint, tmp_path / "p")
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.experts.up_proj.weight_absmax_scales"
    tensors[name] = tensors[name][:-1].clone()
    shorter = rewritten(tmp_path / "q", checkpoint, tensors)
    assert inspect_path(shorter).problems == [f"{name} is [4, 1], config.json asks for [5, 1]"]
