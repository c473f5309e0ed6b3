"""Merged models in compressed-tensors' form: what stands in the files, and that transformers computes with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded import merge
from tests.adapters import logits_of, recast, transformers_model, write_adapter
from tests.checkpoints import write_checkpoint
from tests.models.architectures import write_architecture

pytest.importorskip("compressed_tensors")
from qsharded.integrations import compressed_tensors, merged_forms

IDS = torch.arange(48).view(2, 24) * 7 % 97
PROJECTION = "model.layers.1.mlp.down_proj.weight"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}


def merged_twice(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 1, **config: Any) -> list[Path]:
    """The same merge in 16 bits and packed."""
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model", shards=shards, **config), dtype)
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    folders = []
    for form in ("safetensors", "compressed-tensors"):
        folders.append(tmp_path / form)
        words = ["--adapter", str(adapter), "--model", str(checkpoint), "--output", str(folders[-1]), "--format", form]
        merge.main([*words, "--check-rows", "0"])
    return folders


def nearest(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(codes from -8 to 7, scales) by W4A16's definition, with the scale as it is stored."""
    groups = weight.float().unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 7.5).to(weight.dtype)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    return codes.flatten(1), scales


def unpacked(words: Tensor) -> Tensor:
    """The 8 codes of each int32, the first in its lowest bits, stored as 0 to 15."""
    return torch.stack([(words >> 4 * place & 15) - 8 for place in range(8)], -1).flatten(1)


@pytest.mark.parametrize(("width", "group"), [(128, 64), (256, 128), (96, 32)])
def test_codes_and_scales_are_those_of_the_scheme(tmp_path: Path, width: int, group: int) -> None:
    config = {"intermediate_size": 2 * width if width == 256 else 192, "hidden_size": width}
    plain, packed = map(tensors, merged_twice(tmp_path, shards=2, num_attention_heads=2, **config))
    layers = {name for name in plain if name.endswith("_proj.weight")}
    assert packed.keys() == (plain.keys() - layers) | {
        f"{n}_{end}" for n in layers for end in ("packed", "scale", "shape")
    }
    for name, weight in plain.items():
        if name not in layers:
            assert torch.equal(packed[name], weight), name
            continue
        codes, scales = nearest(weight, group)
        assert torch.equal(packed[f"{name}_scale"], scales), name
        assert torch.equal(unpacked(packed[f"{name}_packed"]).float(), codes), name
        assert packed[f"{name}_shape"].tolist() == list(weight.shape)


def test_the_index_and_the_config_say_what_is_there(tmp_path: Path) -> None:
    _, folder = merged_twice(tmp_path, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["format"], said["quantization_status"]) == (
        "compressed-tensors", "pack-quantized", "compressed"
    )  # fmt: skip
    assert said["ignore"] == ["lm_head"]
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 64


def test_layers_whose_rows_are_no_whole_groups_stay_and_are_named(tmp_path: Path) -> None:
    plain, packed = merged_twice(tmp_path, intermediate_size=200)
    assert torch.equal(tensors(packed)[PROJECTION], tensors(plain)[PROJECTION])
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head", *(f"model.layers.{n}.mlp.down_proj" for n in range(2))]
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 128


@pytest.mark.parametrize("dequantize", [True, False])
def test_transformers_computes_with_what_is_in_the_files(tmp_path: Path, dequantize: bool) -> None:
    from transformers import CompressedTensorsConfig

    plain, packed = merged_twice(tmp_path, torch.float32, attention_bias=True)
    expected = transformers_model(plain)
    before = logits_of(expected, IDS)
    for name, parameter in expected.named_parameters():
        if name.endswith("_proj.weight"):
            codes, scales = nearest(parameter.data, 64)
            parameter.data = (codes.unflatten(-1, (-1, 64)) * scales[..., None]).flatten(1)
    config = CompressedTensorsConfig(dequantize=dequantize)
    got = logits_of(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, quantization_config=config), IDS)
    torch.testing.assert_close(got, logits_of(expected, IDS), atol=1e-4, rtol=1e-4)
    assert (got - before).abs().max() > 0.01  # 4 bits are another model


def test_rows_are_packed_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = merged_twice(tmp_path)
    monkeypatch.setattr(compressed_tensors, "_ELEMENTS_AT_ONCE", 700)
    (tmp_path / "again").mkdir()
    _, parts = merged_twice(tmp_path / "again")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_model_is_compared_as_it_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: str
) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights[stored] = weights.pop("model.embed_tokens.weight")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    options = {"model": str(checkpoint), "adapter": str(adapter), "format": "compressed-tensors"}
    with caplog.at_level("INFO"):
        merge.run(merge.MergeConfig(output=str(tmp_path / "merged"), **options))
    assert "compared with those of base and adapter: largest difference" in caplog.text


def test_a_package_that_is_missing_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_checkpoint(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    monkeypatch.setattr(merged_forms, "find_spec", lambda name: None)
    monkeypatch.setattr(merge, "merge_weights", None)
    options = {"model": str(checkpoint), "adapter": str(adapter), "output": str(tmp_path / "o")}
    for form in ("gguf", "compressed-tensors"):
        with pytest.raises(ValueError, match=rf"--format {form} needs .*: pip install 'qsharded\[{form}\]'"):
            merge.run(merge.MergeConfig(format=form, **options))


def test_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not pack mixtures of experts.*LLM Compressor"):
        compressed_tensors.check_convertible(write_architecture(tmp_path, "qwen3_moe"))


def test_models_with_other_parts_than_text_are_refused(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 97}  # fmt: skip
    described = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"models of text alone.*LLM Compressor"):
        compressed_tensors.check_convertible(tmp_path)
