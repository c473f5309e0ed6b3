"""Merging against PEFT's own merge, and against the NF4 model with its adapter."""

import ctypes
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded import quantize
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config, save_adapter, trainable
from qsharded.checkpoint.merge_adapter import merge_weights
from qsharded.data import Tokenizer
from qsharded.data.template_options import TemplateOptions
from qsharded.merge import MergeConfig, main, run
from qsharded.nn import LoRAConfig
from qsharded.quant import formats
from tests.adapters import recast, transformers_model, write_adapter
from tests.checkpoints import write_checkpoint
from tests.data.folders import make_folder
from tests.distributed.harness import run_ranks

M_MMAP_THRESHOLD = -3  # of malloc.h
IDS = torch.arange(48).view(2, 24) * 7 % 97
ADAPTERS = {
    "two-layers": {},
    "patterns-rslora": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
        "alpha_pattern": {"o_proj": 3},
    },
    "modules-to-save": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama in three files."""
    return write_checkpoint(tmp_path_factory.mktemp("llama"), shards=3)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on some of its layers."""
    return write_adapter(tmp_path_factory.mktemp("adapter"), checkpoint)


def merge(checkpoint: Path, adapter: Path, output: Path, **options: Any) -> Path:
    options = {"check_rows": 0} | options
    run(MergeConfig(model=str(checkpoint), adapter=str(adapter), output=str(output), **options))
    return output


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}


def assert_bits_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == weight.dtype
        assert torch.equal(got[name], weight), name


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_16_bits_equals_pefts_merge_to_the_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model", shards=3), dtype)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **ADAPTERS[kind])
    merged = merge(checkpoint, adapter, tmp_path / "merged")
    theirs = PeftModel.from_pretrained(transformers_model(checkpoint), adapter).merge_and_unload()
    assert_bits_equal(transformers_model(merged).state_dict(), theirs.state_dict())


def test_an_adapter_of_ours_merges_as_peft_merges_it(tmp_path: Path, checkpoint: Path) -> None:
    config = LoRAConfig(r=3, rank_pattern={"v_proj": 5}, use_rslora=True, modules_to_save=["lm_head"])
    model = load_model(checkpoint, lora=config, device="cpu")
    torch.manual_seed(0)
    for _, parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, config, tmp_path / "adapter", base_model=str(checkpoint))
    merged = merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    theirs = PeftModel.from_pretrained(transformers_model(checkpoint), tmp_path / "adapter").merge_and_unload()
    assert_bits_equal(transformers_model(merged).state_dict(), theirs.state_dict())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    merged = merge(checkpoint, write_adapter(tmp_path / "adapter", checkpoint), tmp_path / "merged")
    assert "lm_head.weight" not in tensors(merged)
    model = transformers_model(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ADAPTERS)
def test_on_nf4_answers_as_the_trained_model(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model", shards=2, attention_bias=True), torch.float32)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **ADAPTERS[kind])
    trained = load_model(checkpoint, lora=read_lora_config(adapter), dtype=torch.float32, device="cpu")
    load_adapter(trained, adapter)
    with torch.no_grad():
        expected = trained(IDS)
        got = transformers_model(merge(checkpoint, adapter, tmp_path / "merged", base="nf4"))(IDS).logits
        base = transformers_model(merge(checkpoint, adapter, tmp_path / "16bit"))(IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (base - expected).abs().max() > 0.01  # the other base is another model


@pytest.mark.parametrize(("quant_type", "block_size"), [("fp4", 32), ("nf4", 128)])
def test_on_another_kind_answers_as_what_was_trained_on_it(tmp_path: Path, quant_type: str, block_size: int) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model", intermediate_size=160), torch.float32)
    adapter, packed = write_adapter(tmp_path / "adapter", checkpoint), tmp_path / "packed"
    kind = [f"--quant-type={quant_type}", f"--block-size={block_size}"]
    quantize.main([f"--model={checkpoint}", f"--output={packed}", *kind])
    trained = load_model(packed, lora=read_lora_config(adapter), dtype=torch.float32, device="cpu")
    load_adapter(trained, adapter)
    merged = merge(checkpoint, adapter, tmp_path / "merged", base=quant_type, block_size=block_size)
    with torch.no_grad():
        torch.testing.assert_close(transformers_model(merged)(IDS).logits, trained(IDS), atol=1e-5, rtol=1e-5)


def test_on_16_bits_any_in_features_will_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model").mkdir()
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 160}
    checkpoint = write_checkpoint(tmp_path / "model", **sizes)  # no multiples of 64
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    assert tensors(merge(checkpoint, adapter, tmp_path / "merged")).keys() == tensors(checkpoint).keys()
    assert "not quantized" not in caplog.text


def test_on_nf4_rounds_the_fp32_sum_once(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    merged, stored = tensors(merge(checkpoint, adapter, tmp_path / "merged", base="nf4")), tensors(checkpoint)
    update = load_file(adapter / "adapter_model.safetensors")
    for name, weight in stored.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(merged[name], weight)
            continue
        expected = formats.quantize(weight).dequantize(torch.float32)
        prefix = "base_model.model." + name.removesuffix("weight")
        if f"{prefix}lora_A.weight" in update:
            expected = update[f"{prefix}lora_B.weight"] @ update[f"{prefix}lora_A.weight"] * (12 / 4) + expected
        assert torch.equal(merged[name], expected.bfloat16()), name


def test_files_keep_their_layout_and_what_is_not_adapted_its_bytes(
    tmp_path: Path, checkpoint: Path, adapter: Path
) -> None:
    merged = merge(checkpoint, adapter, tmp_path / "merged")
    files = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in merged.iterdir()} == files | {"README.md"}
    assert len(files) == 5
    for name in files:
        before, after = (checkpoint / name).read_bytes(), (merged / name).read_bytes()
        if name.endswith(".json"):
            assert after == before
        else:
            header = 8 + int.from_bytes(before[:8], "little")
            assert (after[:header], len(after)) == (before[:header], len(before))
    stored, changed = tensors(checkpoint), tensors(merged)
    adapted = {name for name in stored if not torch.equal(stored[name], changed[name])}
    assert adapted == {name for name in stored if "q_proj" in name or "down_proj" in name}


def test_the_adapters_tokenizer_is_taken_whole_before_the_models(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_checkpoint(make_folder(tmp_path / "model", template="of the model"))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 5}')
    (checkpoint / "chat_template.jinja").write_text("of the model")
    merged = merge(checkpoint, adapter, tmp_path / "with-the-models")
    assert (merged / "chat_template.jinja").read_text() == "of the model"
    assert json.loads((merged / "generation_config.json").read_text()) == {"eos_token_id": 5}
    own = write_adapter(tmp_path / "adapter", checkpoint)
    make_folder(own, "metaspace", template="of the adapter")
    merged = merge(checkpoint, own, tmp_path / "with-the-adapters")
    assert (merged / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    assert json.loads((merged / "tokenizer_config.json").read_text())["chat_template"] == "of the adapter"
    assert not (merged / "chat_template.jinja").exists()
    assert not (merged / "adapter_config.json").exists()


def test_the_template_of_a_checkpoints_adapter_goes_with_the_merged_model(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(make_folder(tmp_path / "model", template="of the model"))
    adapter = write_adapter(tmp_path / "adapter", checkpoint)  # without a tokenizer, as in a run's checkpoints
    (tmp_path / "mine.jinja").write_text("{{ level }}")
    for name, content in TemplateOptions(tmp_path / "mine.jinja", {"level": 3}).files().items():
        (adapter / name).write_bytes(content)
    merged = merge(checkpoint, adapter, tmp_path / "merged")
    assert Tokenizer.from_folder(merged).render([{"role": "user", "content": "a"}]) == "3"


def memory_of_merge(checkpoint: Path, adapter: Path, small: Path, small_adapter: Path, target: Path) -> int:
    """Bytes by which the peak of this process's resident memory grows; what a first merge loads is not counted."""
    # What is freed goes back to the system at once, as tensors of real models do, which are larger.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    peaks = []
    target.mkdir()
    for model, update in ((small, small_adapter), (checkpoint, adapter)):
        for base in ("16bit", "nf4"):
            merge_weights(model, update, target, base)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (peaks[1] - peaks[0]) * 1024


def test_memory_is_bounded_by_one_file(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    (tmp_path / "large").mkdir()
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "vocab_size": 512}
    large = write_checkpoint(tmp_path / "large", shards=4, **shape)
    large_adapter = write_adapter(tmp_path / "adapter", large)
    growth = run_ranks(memory_of_merge, 1, large, large_adapter, checkpoint, adapter, tmp_path / "merged")[0]
    # One file, which is mapped while it is read, and less for all else: a second file would not fit.
    assert growth < 2 * min(path.stat().st_size for path in large.glob("*.safetensors"))


def edited(adapter: Path, target: Path, changes: dict[str, Tensor | None]) -> Path:
    """A copy of an adapter with some tensors replaced, added or (None) removed."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors") | changes
    save_file({name: w for name, w in weights.items() if w is not None}, target / "adapter_model.safetensors")
    return target


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


def nan_at_first(*shape: int) -> Tensor:
    values = torch.ones(shape)
    values[0, 0] = torch.nan
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 128)}, r"layers\.7\.mlp\.up_proj"),
        ({"base_model.model.model.norm.weight": torch.ones(128)}, r"holds base_model\.model\.model\.norm\.weight"),
        ({f"{LAYER}.lora_B.weight": None}, r"lacks .*layers\.1\.self_attn\.q_proj\.lora_B"),
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 64)}, r"q_proj\.lora_A\.weight is \(4, 64\), the model's is \(4, 12"),
        ({f"{LAYER}.lora_B.weight": torch.full((128, 4), torch.nan)}, r"layers\.1\.self_attn\.q_proj\.weight is not f"),
        ({f"{LAYER}.lora_B.weight": nan_at_first(128, 4)}, r"layers\.1\.self_attn\.q_proj\.weight is not finite"),
    ],
    ids=["no-such-layer", "not-to-save", "missing", "shape", "nan", "nan-in-the-first-row"],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_left(
    tmp_path: Path, checkpoint: Path, adapter: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge(checkpoint, edited(adapter, tmp_path / "adapter", changes), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_base_model_is_told(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    (tmp_path / "model").mkdir()
    other = write_checkpoint(tmp_path / "model", hidden_size=192)
    with pytest.raises(ValueError, match=f"trained on {checkpoint}, --model is {other}"):
        merge(other, adapter, tmp_path / "merged")


def test_an_occupied_output_is_refused_and_an_empty_one_taken(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    merge(checkpoint, adapter, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(ValueError, match=r"merged exists and is not an empty folder"):
        merge(checkpoint, adapter, output)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_the_command_finds_the_base_that_the_adapter_names(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    main(["--adapter", str(adapter), "--output", str(tmp_path / "new" / "merged")])
    with safe_open(next((tmp_path / "new" / "merged").glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--output", "out"], 2, "--adapter is required"),
        (["--adapter", "nowhere", "--output", "out"], 2, "--adapter nowhere is no adapter folder"),
        (["--model", "nowhere", "--adapter", "{adapter}", "--output", "out"], 1, "nowhere is neither a folder"),
        (
            ["--adapter", "{adapter}", "--output", "out", "--base", "8bit"],
            2,
            "--base must be one of 16bit, nf4, fp4, got",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    adapter: Path, flags: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main([flag.format(adapter=adapter) for flag in flags])
    assert raised.value.code == status
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
