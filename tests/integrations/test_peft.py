"""PEFT adapts models of PackedLinear layers; the reference is PEFT on the dequantized weights in plain layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.checkpoint.adapter import save_adapter as native_save
from qsharded.distributed import fsdp
from qsharded.integrations import peft as integration
from qsharded.integrations.peft import PackedLoraLinear, save_adapter
from qsharded.integrations.transformers import QShardedConfig
from qsharded.nn import PackedLinear
from qsharded.quant import formats
from tests.adapters import round_to_nf4, transformers_model, write_adapter
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

IDS = torch.arange(12).view(2, 6)
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K = 192 makes an odd number of blocks a row; q_proj, k_proj and v_proj have a bias."""
    family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return write_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=192, intermediate_size=320, **family)


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    integration.install()
    yield
    integration.uninstall()


def packed_model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, quantization_config=QShardedConfig())


def plain_model(checkpoint: Path) -> PreTrainedModel:
    return round_to_nf4(transformers_model(checkpoint, torch.float32))


def layers(model: nn.Module) -> list[PackedLoraLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLoraLinear)]


def packed_bytes(model: nn.Module) -> list[list[Tensor]]:
    return [[t.clone() for t in m.packed().tensors] for m in model.modules() if isinstance(m, PackedLinear)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_does_what_it_does_on_the_dequantized_weights(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = write_adapter(tmp_path, checkpoint, **settings)
    model = PeftModel.from_pretrained(packed_model(checkpoint), folder)
    reference = PeftModel.from_pretrained(plain_model(checkpoint), folder)
    assert len(layers(model)) == (14 if "target_modules" in settings else 4)
    # the same fp32 products of the same numbers; only the order of sums may differ
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_trains_as_on_the_dequantized_weights(checkpoint: Path, tmp_path: Path, dropout: float) -> None:
    folder = write_adapter(tmp_path, checkpoint, use_dora=True, lora_dropout=dropout)
    gradients = []
    for base in (packed_model(checkpoint), plain_model(checkpoint)):
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).train()
        torch.manual_seed(5)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("magnitude" in name for name in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_merging_quantizes_the_sum_and_unmerging_gives_back_the_bytes(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = write_adapter(tmp_path, checkpoint, **settings)
    model = PeftModel.from_pretrained(packed_model(checkpoint), folder)
    plain = PeftModel.from_pretrained(plain_model(checkpoint), folder)
    before = packed_bytes(model)
    model.merge_adapter()
    plain.merge_adapter(safe_merge=True)
    sums = {name: module.base_layer for name, module in plain.named_modules() if hasattr(module, "merged")}
    for name, merged in sums.items():
        for found, expected in zip(
            model.get_submodule(name).base_layer.packed().tensors,
            PackedLinear.from_linear(merged).packed().tensors,
            strict=True,
        ):
            assert torch.equal(found, expected)
    model.merge_adapter()  # nothing is left to merge
    model.unmerge_adapter()
    for found, expected in zip(packed_bytes(model), before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_merging_keeps_the_kind(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, checkpoint)
    config = QShardedConfig(format="fp4", block_size=32, double_quant=False)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    [name, *_] = [name for name, module in model.named_modules() if isinstance(module, PackedLoraLinear)]
    layer = model.get_submodule(name)
    expected = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    merged = model.merge_and_unload().get_submodule(name.removeprefix("base_model.model."))
    again = formats.quantize(expected.detach(), quant_type="fp4", block_size=32, double_quant=False)
    assert torch.equal(merged.packed().tensors[0], again.codes)
    assert (merged.quant_type, merged.block_size, merged.weight_absmax_scales) == ("fp4", 32, None)


def test_merging_in_turn_gives_the_bytes_of_merging_at_once(checkpoint: Path, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / name, checkpoint, **kind) for name, kind in (("a", {}), ("b", {"r": 2}))]
    results = []
    for steps in ([["a", "b"]], [["a"], ["b"]]):
        model = PeftModel.from_pretrained(packed_model(checkpoint), folders[0], adapter_name="a")
        model.load_adapter(folders[1], adapter_name="b")
        for names in steps:
            model.merge_adapter(names)
        results.append(packed_bytes(model.merge_and_unload()))
    for found, expected in zip(*results, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["LoRA", "modules_to_save"])
def test_its_adapter_is_the_native_one(checkpoint: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    written = write_adapter(tmp_path / "written", checkpoint, target_modules=["q_proj", "up_proj"], **settings)
    model = PeftModel.from_pretrained(packed_model(checkpoint), written)
    model.save_pretrained(tmp_path / "peft")
    config = read_lora_config(tmp_path / "peft")
    native = load_model(checkpoint, lora=config, dtype=torch.float32, device="cpu")
    load_adapter(native, tmp_path / "peft")
    torch.testing.assert_close(native(IDS), model(IDS).logits, rtol=1e-5, atol=1e-5)
    native_save(native, config, tmp_path / "native", base_model=str(checkpoint))
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "native")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_adapters_are_fp32_whatever_the_packed_bytes_are_seen_as(checkpoint: Path) -> None:
    config = LoraConfig(target_modules="all-linear")
    model = get_peft_model(packed_model(checkpoint), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(checkpoint: Path, start: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights = '{start}' changes the base weights"):
        get_peft_model(packed_model(checkpoint), LoraConfig(target_modules=["q_proj"], init_lora_weights=start))


def test_installing_twice_is_as_once_and_can_be_undone(checkpoint: Path) -> None:
    integration.install()
    integration.uninstall()
    assert tuners_utils._maybe_include_all_linear_layers.__module__ == tuners_utils.__name__
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Target module PackedLinear"):
        get_peft_model(packed_model(checkpoint), config)
    assert len(layers(get_peft_model(packed_model(checkpoint), integration.register(config)))) == 2


def trained(checkpoint: Path, shard: bool, folder: Path) -> tuple[list[float], str]:
    """Losses of three steps, the adapter going to ``folder``, and why it cannot be merged."""
    integration.install()
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(packed_model(checkpoint), config)
    if shard:
        fsdp.shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_adapter(model, folder)
    return losses, merging_refused(model)


def merging_refused(model: PeftModel) -> str:
    try:
        model.merge_adapter()
    except ValueError as error:
        return str(error)
    return ""


def test_sharded_it_trains_and_saves_as_in_one_process(checkpoint: Path, tmp_path: Path) -> None:
    losses, refusal = trained(checkpoint, False, tmp_path / "one")
    assert losses[2] < losses[0]
    assert refusal == ""
    for sharded_losses, sharded_refusal in run_ranks(trained, 2, checkpoint, True, tmp_path / "two"):
        assert sharded_losses == losses  # both ranks have the same rows, and the mean of two equal gradients is exact
        assert sharded_refusal.startswith("a sharded layer cannot be merged")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    reread = PeftModel.from_pretrained(packed_model(checkpoint), tmp_path / "two")
    assert len(layers(reread)) == 14
