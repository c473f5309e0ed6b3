"""Adapters in PEFT's files: written, read, and refused where they would act otherwise than here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, peft_config, read_lora_config, save_adapter, trainable
from qsharded.models import CausalLM
from qsharded.nn import LoRAConfig
from tests.checkpoints import write_checkpoint

LORA = LoRAConfig(r=4, lora_alpha=6, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"], use_rslora=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_checkpoint(tmp_path / "model")


def random_adapter(folder: Path) -> CausalLM:
    model = load_model(folder, lora=LORA, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.normal_()
    return model


def test_saved_and_loaded_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = random_adapter(folder)
    save_adapter(model, LORA, tmp_path / "adapter", base_model="base")
    config = read_lora_config(tmp_path / "adapter")
    other = load_model(folder, lora=config, dtype=torch.float32)
    load_adapter(other, tmp_path / "adapter")
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids), other(ids))
    assert config.rank("model.layers.0.self_attn.q_proj") == 2
    assert config.rank("model.layers.0.self_attn.k_proj") == 4


def test_the_file_holds_what_trains_and_no_more(folder: Path, tmp_path: Path) -> None:
    save_adapter(random_adapter(folder), LORA, tmp_path / "adapter", base_model="base")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.weight" in names
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in names
    assert len(names) == 2 * 7 * 2 + 1


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type must be LORA"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"some_new_setting": 3}, "some_new_setting = 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"init_lora_weights": ["eva"]}, r"init_lora_weights = \['eva'\]"),
    ],
)
def test_settings_that_are_unknown_here_are_named(folder: Path, tmp_path: Path, changes: dict, complaint: str) -> None:
    save_adapter(random_adapter(folder), LORA, tmp_path / "adapter", base_model="base")
    change_config(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=complaint):
        read_lora_config(tmp_path / "adapter")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_are_read(folder: Path, tmp_path: Path, start: bool | str | None) -> None:
    save_adapter(random_adapter(folder), LORA, tmp_path / "adapter", base_model="base")
    change_config(tmp_path / "adapter", init_lora_weights=start)
    assert read_lora_config(tmp_path / "adapter").rank_pattern == LORA.rank_pattern


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "truncated", "absent"])
def test_an_adapter_of_another_model_is_refused_by_name(folder: Path, tmp_path: Path, fault: str) -> None:
    model = random_adapter(folder)
    save_adapter(model, LORA, tmp_path / "adapter", base_model="base")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights = load_file(path)
    if fault == "missing":
        save_file({key: value for key, value in weights.items() if key != name}, path)
    elif fault == "surplus":
        save_file(weights | {"base_model.model.more": torch.ones(1)}, path)
    elif fault == "shape":
        save_file(weights | {name: torch.ones(9, 128)}, path)
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    complaint = {
        "missing": f"lacks {name}",
        "surplus": r"holds base_model\.model\.more",
        "shape": rf"{name} is \(9, 128\), the model's is \(2, 128\)",
        "truncated": r"adapter_model\.safetensors is missing, damaged or incomplete",
        "absent": r"adapter_model\.safetensors is missing, damaged or incomplete",
    }[fault]
    with pytest.raises(ValueError, match=complaint):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_values_that_are_not_finite_are_refused_by_name(folder: Path, tmp_path: Path, value: float) -> None:
    model = random_adapter(folder)
    save_adapter(model, LORA, tmp_path, base_model="base")
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights = load_file(path)
    weights[name][-1, -1] = value
    save_file(weights, path)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {name} holds NaN or infinity"):
        load_adapter(model, tmp_path)


def test_of_names_that_match_nothing_pefts_adapter_is_read_and_they_are_not_written_again(
    folder: Path, tmp_path: Path
) -> None:
    """PEFT passes them over; what the adapter adapts stands in its file."""
    lora = LoRAConfig(r=4, target_modules=["q_proj"])
    save_adapter(load_model(folder, lora=lora, device="cpu"), lora, tmp_path, base_model="base")
    change_config(tmp_path, target_modules=["q_proj", "w_proj"], rank_pattern={"w_proj": 2})
    read = read_lora_config(tmp_path)
    model = load_model(folder, lora=read, device="cpu")
    load_adapter(model, tmp_path)
    assert peft_config(model, read, "base")["target_modules"] == ["q_proj"]


def test_adapters_that_peft_ties_to_the_heads_are_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(random_adapter(folder), LORA, tmp_path, base_model="base")
    change_config(tmp_path, ensure_weight_tying=True, modules_to_save=None)
    assert read_lora_config(tmp_path).r == LORA.r
    change_config(tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"ensure_weight_tying = True with an adapter on model\.embed_tokens"):
        read_lora_config(tmp_path)
