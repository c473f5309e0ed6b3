"""Runs on models that transformers' code computes: train, resume, generate, merge, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qsharded import train
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.report import inspect_path
from qsharded.merge import MergeConfig
from qsharded.merge import run as merge
from qsharded.models.generation import generate
from qsharded.report.run_files import read_metrics
from tests.checkpoints import write_chat_rows, write_chat_tokenizer
from tests.distributed.harness import run_ranks
from tests.distributed.test_self_check import built, check, exact, world_of_ranks
from tests.distributed.test_train import arguments
from tests.models.architectures import (
    LORA,
    assert_parity,
    batch_of,
    computed_by,
    documents,
    gradients,
    packed_weights,
    round_packed,
    write_architecture,
    write_random_adapter,
)

IDS = torch.arange(24).view(2, 12) * 7 % 90


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Cohere 2, of which there is no code here: parallel blocks, windows, and a scale on its logits."""
    folder = tmp_path_factory.mktemp("cohere2")
    return write_architecture(folder, "cohere2", vocab_size=write_chat_tokenizer(folder), logit_scale=0.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 22)


def run(*args: Any) -> None:
    train.main([*arguments(*args[:3], **args[3]), *args[4]])


@pytest.fixture(scope="module")
def trained(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, stopped halfway by its own end and resumed on one."""
    out = tmp_path_factory.mktemp("out")
    options = {"max_steps": 6, "activation_checkpointing": "full", "save_steps": 6, "dtype": "float32"}
    run_ranks(run, 2, checkpoint, rows, out, options, ["--packing"])
    resumed = options | {"max_steps": 12, "gradient_accumulation_steps": 4, "resume_from_checkpoint": "auto"}
    run_ranks(run, 1, checkpoint, rows, out, resumed, ["--packing"])
    return out


def by_peft(checkpoint: Path, adapter: Path, packed: set[str]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    round_packed(base, packed)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def test_a_run_learns_and_resumes_and_peft_reads_its_adapter(checkpoint: Path, trained: Path) -> None:
    log = read_metrics(trained / "metrics.jsonl")
    evaluated = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert evaluated[-1] < 0.9 * evaluated[0]
    model = with_adapter(checkpoint, trained / "adapter")
    expected = by_peft(checkpoint, trained / "adapter", packed_weights(model))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS).logits, rtol=1e-5, atol=1e-5)
        assert (model(IDS) - load_model(checkpoint, dtype=torch.float32).eval()(IDS)).abs().max() > 1e-3


def with_adapter(checkpoint: Path, adapter: Path) -> Any:
    model = load_model(checkpoint, lora=read_lora_config(adapter), dtype=torch.float32).eval()
    load_adapter(model, adapter)
    return model


def test_answers_are_those_of_transformers(checkpoint: Path, trained: Path) -> None:
    """Two prompts of different lengths, which takes a mask of padding beside the cache."""
    model = with_adapter(checkpoint, trained / "adapter")
    expected = by_peft(checkpoint, trained / "adapter", packed_weights(model))
    prompts = [[5, 8, 13, 21, 34], [7, 11]]
    answers = generate(model, prompts, max_new_tokens=9, eos_ids=())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        whole = expected.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        assert answer == whole[0, len(prompt) :].tolist()


def test_merging_gives_a_checkpoint_that_transformers_reads(checkpoint: Path, trained: Path, tmp_path: Path) -> None:
    merge(MergeConfig(model=str(checkpoint), adapter=str(trained / "adapter"), output=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = by_peft(checkpoint, trained / "adapter", set())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_leaks_is_refused_packing_by_name(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lfm2"
    folder.mkdir()
    write_architecture(folder, "lfm2", vocab_size=write_chat_tokenizer(folder))
    with pytest.raises(SystemExit):
        train.main([*arguments(folder, rows, tmp_path / "out", max_steps=1), "--packing"])
    assert "Lfm2ForCausalLM (lfm2) lets documents of a packed row see each other" in capfd.readouterr().err
    train.main(arguments(folder, rows, tmp_path / "out", max_steps=1))


def changed_by_the_first_document(folder: Path) -> float:
    """How much the second document's logits move when every token of the first is another."""
    model = load_model(folder, dtype=torch.float32, model_code="transformers").eval()
    document_ids = torch.tensor([[0] * 6 + [1] * 6])
    positions = torch.tensor([[*range(6), *range(6)]])
    other = torch.cat(((IDS[:1, :6] + 1) % 61, IDS[:1, 6:] % 61), dim=1)
    with torch.no_grad():
        logits = [
            model(ids, positions_BS=positions, document_ids_BS=document_ids)[:, 6:] for ids in (IDS[:1] % 61, other)
        ]
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "llama4_text", "starcoder2"])
def test_another_first_document_leaves_the_second_ones_logits(tmp_path: Path, model_type: str) -> None:
    assert changed_by_the_first_document(write_architecture(tmp_path, model_type)) < 1e-6


@pytest.mark.parametrize("model_type", ["lfm2", "bamba", "qwen3_5_text", "mpt"])
def test_another_first_document_shows_where_a_model_is_refused_packing(tmp_path: Path, model_type: str) -> None:
    assert changed_by_the_first_document(write_architecture(tmp_path, model_type)) > 1e-3


def test_tensors_that_the_class_ignores_are_carried_through_by_merge(tmp_path: Path) -> None:
    folder = write_architecture(tmp_path / "qwen3_5", "qwen3_5_text")
    ignored = torch.randn(4, 8)
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": ignored}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder, lora=LORA, dtype=torch.float32, model_code="transformers")
    write_random_adapter(model, tmp_path / "adapter")
    merge(MergeConfig(model=str(folder), adapter=str(tmp_path / "adapter"), output=str(tmp_path / "merged")))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    assert torch.equal(merged.pop("mtp.fc.weight"), ignored)
    assert {n for n, w in merged.items() if not torch.equal(w, weights[n])} == packed_weights(model)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_both_codes_give_equal_losses_and_gradients(tmp_path: Path, model_type: str) -> None:
    folder, batch, computed = write_architecture(tmp_path, model_type), batch_of(documents(packed=True)), []
    for code in ("native", "transformers"):
        model = load_model(folder, lora=LORA, dtype=torch.float32, model_code=code)
        write_random_adapter(model, tmp_path / code)
        computed.append((computed_by(model, batch)[1], gradients(model)))
    (native, native_grads), (foreign, foreign_grads) = computed
    assert_parity(foreign, native, "loss")
    assert native_grads.keys() == foreign_grads.keys() != set()
    for name, grad in native_grads.items():
        assert_parity(foreign_grads[name], grad, name)


def test_a_tensor_in_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"OlmoHybridForCausalLM: .*k_conv1d\.weight is stored in another layout"):
        load_model(write_architecture(tmp_path, "olmo_hybrid"), dtype=torch.float32)


def test_an_expert_too_few_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_architecture(tmp_path, "qwen3_moe")
    described = json.loads((folder / "config.json").read_text()) | {"num_local_experts": 5}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"gate_up_proj is stacked of 4 experts .*asks for 5"):
        load_model(folder, dtype=torch.float32, model_code="transformers")


def test_a_buffer_that_nobody_sets_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ValueError, match=r"does not say how its buffer model\.rotary_emb\.\w*inv_freq begins"):
        load_model(write_architecture(tmp_path, "helium"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"model_type": "no_such_model"}, "model_type 'no_such_model' is not supported"),
        ({"model_type": "bert", "is_decoder": True}, "BertLMHeadModel"),
        ({"model_type": "gpt2"}, "no linear layer was quantized"),
        ({"model_type": "opt"}, "OPTForCausalLM: its forward cannot be run on hidden states alone"),
    ],
)
def test_what_cannot_train_is_refused_by_name(tmp_path: Path, described: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, random_init=True)


def test_inspect_knows_the_tensors_of_such_a_model(tmp_path: Path) -> None:
    folder = write_architecture(tmp_path, "mixtral")
    assert inspect_path(folder).problems == []
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if ".experts.1." in name)
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert inspect_path(folder).problems == [f"{name} is [127, 64], config.json asks for [128, 64]"]


def test_adapters_that_peft_takes_for_experts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Experts without a gate are of no layout that is known."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1}
    folder = write_architecture(tmp_path, "nemotron_h", hybrid_override_pattern="*E", topk_group=1, **experts)
    load_model(folder, dtype=torch.float32, lora=replace(LORA, target_modules=["q_proj"]))
    assert "PEFT" not in caplog.text
    load_model(folder, dtype=torch.float32, lora=LORA)
    assert "adapters on down_proj, up_proj: PEFT takes these for the experts'" in caplog.text


@pytest.mark.parametrize("model_type", ["cohere2", "mixtral"])
def test_a_packed_checkpoint_is_the_one_it_was_packed_from(tmp_path: Path, model_type: str) -> None:
    folder, packed = write_architecture(tmp_path, model_type), tmp_path / "packed"
    packed.mkdir()
    quantize_checkpoint(folder, packed, "qsharded", torch.device("cpu"))
    expected, found = (load_model(path, dtype=torch.float32).eval()(IDS % 61) for path in (folder, packed))
    assert torch.equal(found, expected)


SELF_CHECKED = ("mixtral", "gemma4_text", "falcon_h1")


def self_checks(folders: dict[str, Path]) -> list[str]:
    world = world_of_ranks()
    modes = {name: {"code": "transformers", "lora": LORA, "checkpointing": "full"} for name in folders}
    return [check(world, *built(world, folder, modes[name])) for name, folder in folders.items()]


@pytest.mark.slow
def test_layers_of_theirs_pass_the_self_check(tmp_path: Path) -> None:
    """A mixture of experts, layers with inputs of their own, and ones with a state."""
    folders = {name: write_architecture(tmp_path / name, name) for name in SELF_CHECKED}
    for said in run_ranks(self_checks, 2, folders):
        for name, line in zip(SELF_CHECKED, said, strict=True):
            assert exact(line), (name, line)
