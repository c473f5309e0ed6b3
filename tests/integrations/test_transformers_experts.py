"""transformers reads, writes and shards models whose experts are packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter

from qsharded.checkpoint import load_model
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.integrations import peft as peft_integration
from qsharded.integrations.transformers import QShardedConfig
from qsharded.integrations.transformers_experts import one_at_a_time
from qsharded.quant.experts import PackedExperts
from tests.integrations.test_transformers import as_bytes
from tests.models.architectures import assert_parity, packed_weights, round_packed, write_architecture

IDS = torch.arange(12).view(2, 6)
MIXTURES = ["olmoe", "gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("granitemoe", "mixtral"))]


def read(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def packed(folder: Path, **settings: Any) -> PreTrainedModel:
    return read(folder, quantization_config=QShardedConfig(**settings))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Experts apart (OLMoE, Mixtral), in tensors of three dimensions (Granite), turned around with biases (gpt-oss)."""
    folders: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = write_architecture(tmp_path_factory.mktemp(model_type), model_type)
        return folders[model_type]

    return folder


@pytest.mark.parametrize("model_type", MIXTURES)
def test_its_bytes_are_those_of_the_loader_and_its_logits_those_of_the_decoded_weights(
    checkpoints: Any, model_type: str
) -> None:
    folder = checkpoints(model_type)
    model, ours = packed(folder), load_model(folder, dtype=torch.float32, device="cpu", model_code="transformers")
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 6
    assert as_bytes(model.state_dict()) == as_bytes(ours.state_dict())
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, PackedExperts) for p in m.parameters())
    theirs = read(folder)
    round_packed(theirs, packed_weights(ours))
    with torch.no_grad():
        assert_parity(model(IDS).logits, theirs(IDS).logits, model_type)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_saved_model_and_a_quantized_checkpoint_are_the_same_to_every_reader(
    checkpoints: Any, model_type: str, tmp_path: Path
) -> None:
    model, written = packed(checkpoints(model_type)), tmp_path / "written"
    model.save_pretrained(tmp_path / "saved")
    written.mkdir()
    quantize_checkpoint(checkpoints(model_type), written, "qsharded", torch.device("cpu"))
    expected = load_model(checkpoints(model_type), dtype=torch.float32, device="cpu").eval()(IDS)
    for folder in (tmp_path / "saved", written):
        assert as_bytes(read(folder).state_dict()) == as_bytes(model.state_dict())
        assert load_model(folder, dtype=torch.float32, device="cpu").eval()(IDS).equal(expected)


def test_experts_are_stacked_nowhere(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither before they are packed, nor all read at once: transformers' own way would."""
    shapes: list[tuple[int, ...]] = []
    stack = MergeModulelist.convert

    def noted(*args: Any, **kwargs: Any) -> Any:
        made = stack(*args, **kwargs)
        shapes.extend(tuple(value.shape) for value in made.values())
        return made

    monkeypatch.setattr(MergeModulelist, "convert", noted)
    packed(checkpoints("olmoe"))
    assert shapes == []
    packed(checkpoints("olmoe"), modules_to_not_convert=["lm_head", "model.layers.1.mlp.experts"])
    assert len(shapes) == 3  # the other layer's gate, up and down


@pytest.mark.parametrize("operation", ["MergeModulelist(1)", "Transpose()"])
def test_a_rule_that_does_more_than_stacking_stays_as_it_is(operation: str) -> None:
    from transformers import core_model_loading as loading

    operations = [eval(f"loading.{operation}", {"loading": loading})]
    rule = one_at_a_time(WeightConverter("experts.*.down_proj.weight", "experts.down_proj", operations))
    assert type(rule) is WeightConverter


def test_layers_that_are_left_out_keep_their_experts_and_are_read_again(checkpoints: Any, tmp_path: Path) -> None:
    model = packed(checkpoints("olmoe"), modules_to_not_convert=["lm_head", "model.layers.1.mlp.experts"])
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["SplitExperts", "OlmoeExperts"]
    model.save_pretrained(tmp_path)
    assert as_bytes(read(tmp_path).state_dict()) == as_bytes(model.state_dict())


def test_a_packed_checkpoint_whose_experts_are_in_16_bits_is_read_as_it_is(checkpoints: Any, tmp_path: Path) -> None:
    """As ``QShardedConfig`` wrote it when it packed no experts."""
    quantized = packed(checkpoints("olmoe"), modules_to_not_convert=["lm_head", "experts"])
    assert type(quantized.model.layers[1].mlp.experts).__name__ == "OlmoeExperts"
    quantized.config.quantization_config.modules_to_not_convert = None
    quantized.save_pretrained(tmp_path)
    again = read(tmp_path)
    assert as_bytes(again.state_dict()) == as_bytes(quantized.state_dict())
    assert load_model(tmp_path, dtype=torch.float32, device="cpu").eval()(IDS).isfinite().all()


def test_one_projection_in_16_bits_is_refused_by_name(tmp_path: Path) -> None:
    folder, written = write_architecture(tmp_path / "olmoe", "olmoe", intermediate_size=96), tmp_path / "written"
    written.mkdir()
    quantize_checkpoint(folder, written, "qsharded", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts: the rows of one of its projections are no"):
        read(written)


def test_without_double_quantization_experts_stay(checkpoints: Any) -> None:
    model = packed(checkpoints("olmoe"), double_quant=False)
    assert not any(isinstance(module, PackedExperts) for module in model.modules())


def test_a_damaged_expert_and_one_too_few_are_refused_by_name(checkpoints: Any, tmp_path: Path) -> None:
    weights = load_file(checkpoints("olmoe") / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints("olmoe") / "config.json").read_text())
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for damaged, message in (
        (weights | {name: weights[name] * torch.nan}, r"layers\.1\.mlp\.experts\.up_proj\.weight holds NaN"),
        ({n: w for n, w in weights.items() if n != name}, r"layers\.1\.mlp\.experts\.gate_up_proj is stacked of 3 exp"),
    ):
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            packed(tmp_path)


def test_peft_is_refused_to_adapt_packed_experts(checkpoints: Any) -> None:
    """It would find no such parameter, warn, and train the rest."""
    model = packed(checkpoints("olmoe"))
    peft_integration.install()
    try:
        with pytest.raises(ValueError, match=r"^target_parameters = 'experts\.gate_up_proj': model\.layers\.0\."):
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]))
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    finally:
        peft_integration.uninstall()
