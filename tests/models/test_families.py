"""Every family and variant against transformers and PEFT, on one process; on two in tests/distributed."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qsharded import quantize
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.report import inspect_path
from qsharded.config import TrainConfig
from qsharded.distributed.world import World
from qsharded.fused import forwards
from qsharded.fused.layer import beyond_fused
from qsharded.merge import MergeConfig, run
from qsharded.models import ModelConfig, decoder
from qsharded.models.attention_inputs import attention_inputs
from qsharded.models.families import FAMILIES, WRAPPERS
from qsharded.models.generation import generate
from qsharded.nn import LoRAConfig
from qsharded.plan.run import plan
from qsharded.utils.documents import Boundaries
from tests.models.parity import LENGTH, assert_close, case, ids, is_of_decoder, load, load_folders, results
from tests.models.variants import VARIANTS, model_type_of
from tests.plan.test_activations import B, S, peak_of_a_step

SHORT = LENGTH // 3
ADAPTED = re.compile(
    r"shared_expert_gate\.weight$|_proj\w*\.weight$|\.experts\.\w+_proj$|\.experts\.\d+\.w[123]\.weight$"
)
# What of a family or a variant the fused layer does not compute. All others are fused.
COMPOSED = {
    "olmo2": "norms of q and k other than of each head before it is rotated",
    "olmo3": "norms of q and k other than of each head before it is rotated",
    "arcee": "an MLP without a gate",
    "qwen3_5": "gated delta-net layers",
    "qwen3_5_text": "gated delta-net layers",
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_moe", "qwen3_next"), "gated delta-net layers"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "latent attention"),
    "hunyuan_v1_dense": "norms of q and k other than of each head before it is rotated",
}
# Rows beyond their original context, where q is scaled by position; shorter ones are fused ("ministral3-short").
COMPOSED_FOR_ITS_LENGTH = {"ministral3", "mistral3"}


def test_every_family_has_a_variant() -> None:
    assert {model_type_of(variant) for variant in VARIANTS} == FAMILIES.keys() | WRAPPERS.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_are_those_of_peft(variant: str) -> None:
    assert_close(results(load(variant)), case(variant).expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_installed_transformers_spells_the_same_model(variant: str) -> None:
    assert ModelConfig.from_hf(case(variant).rewritten) == ModelConfig.from_hf(VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_are_as_each_alone(variant: str) -> None:
    model, row = load(variant), ids()[:1]
    positions = torch.cat((torch.arange(SHORT), torch.arange(LENGTH - SHORT)))[None]
    documents = (torch.arange(LENGTH) >= SHORT).long()[None]
    with torch.no_grad():
        packed = model(row, positions_BS=positions, document_ids_BS=documents)
        alone = torch.cat((model(row[:, :SHORT]), model(row[:, SHORT:])), dim=1)
        together = model(row)
    assert_close({"logits": packed}, {"logits": alone})
    assert (together - alone)[:, SHORT:].abs().max() > 1e-3, "the second document saw the first: nothing was shown"


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_a_cache_is_as_without(variant: str) -> None:
    """Ragged prompts, longer than the windows; longrope's on either side of the original length."""
    model, row = load(variant).eval(), ids()[0].tolist()
    prompts = [row[:13], row[13:15]]
    made = generate(model, prompts, max_new_tokens=5, eos_ids=())
    for prompt, tokens in zip(prompts, made, strict=True):
        text = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert tokens == text[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_is_that_of_peft(variant: str, tmp_path: Path) -> None:
    """Merged into the 16-bit weights, and every other tensor as it was."""
    folders = case(variant)
    kind = AutoModelForImageTextToText if "text_config" in VARIANTS[variant] else AutoModelForCausalLM
    base = kind.from_pretrained(folders.checkpoint, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, folders.adapter).merge_and_unload()
    merge = MergeConfig(model=str(folders.checkpoint), adapter=str(folders.adapter), output=str(tmp_path / "merged"))
    run(merge)
    merged = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(dict(merged.named_parameters()), dict(expected.named_parameters()))
    before, after = (load_file(path / "model.safetensors") for path in (folders.checkpoint, tmp_path / "merged"))
    assert before.keys() == after.keys()
    for name, stored in before.items():
        is_adapted = is_of_decoder(name) and ADAPTED.search(name) is not None
        assert torch.equal(after[name], stored) != is_adapted, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_layers_are_fused(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fused = forwards.fused_forward
    monkeypatch.setattr(forwards, "fused_forward", lambda *args: calls.append(args) or fused(*args))
    model = load(variant)
    reason = COMPOSED.get(variant, COMPOSED.get(model_type_of(variant)))
    assert beyond_fused(model.config) == reason
    model(ids(), targets_BS=ids())
    is_composed = reason is not None or variant in COMPOSED_FOR_ITS_LENGTH
    assert len(calls) == (0 if is_composed else model.config.num_hidden_layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_adds_up_to_a_step_of_the_whole_model(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the inputs that attention gets on a GPU."""
    on_gpu, rows = torch.device("cuda"), Boundaries.of_rows(B, S, torch.device("meta"))

    def gpu_inputs(config: ModelConfig, positions: Tensor, dtype: torch.dtype, **_: Any) -> Any:
        return attention_inputs(config, positions, dtype, documents_BT=positions, boundaries=rows, device=on_gpu)

    monkeypatch.setattr(decoder, "attention_inputs", gpu_inputs)
    config, lora = ModelConfig.from_hf(VARIANTS[variant]), LoRAConfig(r=4)
    options = TrainConfig(
        model="m", dataset="d", max_length=S, per_device_train_batch_size=B, activation_checkpointing="full"
    )
    planned = plan(config, options, 1, lora=lora)
    phase = planned.peak_phase
    passing = sum(row.bytes for row in planned.rows if phase in row.phases and "optimizer step" not in row.phases)
    # layers of two kinds: the one that takes more need not be the last, whose backward is the worst moment
    room = B * S * config.hidden_size * 2 * (1 if config.linear is None else 4)
    assert 0 <= passing - peak_of_a_step(config, lora, options.checkpointing) < room


@pytest.mark.parametrize("variant", ["gemma3", "mistral3"])
def test_a_packed_multimodal_checkpoint_trains_as_the_original_and_keeps_the_other_parts(
    variant: str, tmp_path: Path
) -> None:
    folders = case(variant)
    config = quantize.QuantizeConfig(model=str(folders.checkpoint), output=str(tmp_path / "p"))
    quantize.run(config, World.single_process(torch.device("cpu")))
    assert_close(results(load_folders(tmp_path / "p", folders.adapter)), results(load(variant)))
    before, after = (load_file(path / "model.safetensors") for path in (folders.checkpoint, tmp_path / "p"))
    others = [name for name in before if "language_model" not in name and "lm_head" not in name]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_an_adapter_on_a_tied_embedding_unties_a_multimodal_model_as_peft_does(tmp_path: Path) -> None:
    """The head is written beside the embedding, in the names of the files."""
    checkpoint = case("gemma3").checkpoint
    model = load_model(checkpoint, lora=LoRAConfig(r=4, target_modules=["embed_tokens"]), dtype=torch.float32)
    torch.manual_seed(5)
    for _, parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, LoRAConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "a", base_model=str(checkpoint))
    run(MergeConfig(model=str(checkpoint), adapter=str(tmp_path / "a"), output=str(tmp_path / "m")))
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path / "a")(input_ids=ids()).logits
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32)(
            input_ids=ids()
        ).logits
    assert_close({"logits": merged}, {"logits": expected})


def test_peft_reads_a_multimodal_models_adapter_of_all_linear_layers(tmp_path: Path, caplog: Any) -> None:
    """It adapts no layer of another part, though their names end alike."""
    checkpoint = case("gemma3").checkpoint
    caplog.set_level("INFO")
    model = load_model(checkpoint, lora=LoRAConfig(r=4), dtype=torch.float32)
    assert "its text part alone is loaded" in caplog.text
    save_adapter(model, LoRAConfig(r=4), tmp_path, base_model=str(checkpoint))
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it misses
        peft = PeftModel.from_pretrained(base, tmp_path)
    ours = {name for name, _ in trainable(model)}
    assert ours == {name.replace(".default.", ".") for name, _ in peft.named_parameters() if "lora_" in name}


BEHIND_THE_LAST = (
    "embed_tokens",
    "enorm",
    "eh_proj",
    "self_attn.kv_b_proj",
    "mlp.gate",
    "mlp.experts.0.up_proj",
    "mlp.shared_experts.down_proj",
    "shared_head.head",
)


@pytest.mark.parametrize(
    ("variant", "further"),
    [
        ("qwen3_5_text", ["mtp.fc.weight", "mtp.norm.weight"]),
        ("deepseek_v3", [f"model.layers.2.{name}.weight" for name in BEHIND_THE_LAST]),
    ],
)
def test_layers_that_predict_further_tokens_are_passed_over_and_carried_through(
    variant: str, further: list[str], tmp_path: Path
) -> None:
    folders, added = case(variant), {name: torch.randn(8, 64) for name in further}
    shutil.copytree(folders.checkpoint, tmp_path / "base")
    weights = load_file(folders.checkpoint / "model.safetensors") | added
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert_close(results(load_folders(tmp_path / "base", folders.adapter)), results(load(variant)))
    run(MergeConfig(model=str(tmp_path / "base"), adapter=str(folders.adapter), output=str(tmp_path / "merged")))
    packed = quantize.QuantizeConfig(model=str(tmp_path / "base"), output=str(tmp_path / "packed"))
    quantize.run(packed, World.single_process(torch.device("cpu")))
    for folder in ("merged", "packed"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in added.items())
    assert_close(results(load_folders(tmp_path / "packed", folders.adapter)), results(load(variant)))


@pytest.mark.parametrize("variant", ["gemma3", "qwen3_5", "phi3", "qwen3_5_text"])
def test_inspect_finds_such_checkpoints_sound(variant: str) -> None:
    assert inspect_path(case(variant).checkpoint).problems == []
