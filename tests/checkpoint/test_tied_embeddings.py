"""Embedding and head where config.json ties them: what the files hold decides, as transformers reads them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qsharded import merge, quantize, train
from qsharded.checkpoint import load_model, read_ahead
from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.checkpoint.load import load_model as load
from qsharded.checkpoint.report import inspect_path
from qsharded.checkpoint.tied_embeddings import EMBEDDING, HEAD
from qsharded.distributed.choose_layout import Layout
from qsharded.integrations.transformers import QShardedConfig
from qsharded.utils.sharding import whole
from tests.adapters import recast, round_to_nf4, transformers_model, write_adapter
from tests.checkpoints import pack_by_bitsandbytes, write_checkpoint
from tests.distributed.harness import run_ranks

IDS = torch.arange(48).view(2, 24) * 7 % 97
HEADS = ["absent", "equal", "different", "alone"]


def tied(folder: Path, head: str, **config: Any) -> Path:
    """An fp32 checkpoint whose config.json ties the head, and whose files hold it so: the last of its values alone is
    another where it is "different", and there is no embedding where it is "alone"."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, **{"tie_word_embeddings": True, **config})
    (path,) = recast(folder, torch.float32).glob("*.safetensors")
    weights = load_file(path)
    if head != "absent":
        weights[HEAD] = weights[EMBEDDING].clone()
    if head == "different":
        weights[HEAD][-1] += 1
    if head == "alone":
        del weights[EMBEDDING]
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        said = model(IDS)
    return getattr(said, "logits", said)


def ours(folder: Path, adapter: Path | None = None, **options: Any) -> Any:
    lora = read_lora_config(adapter) if adapter else None
    model = load_model(folder, lora=lora, dtype=torch.float32, device="cpu", **options)
    if adapter:
        load_adapter(model, adapter)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_it_is_read_as_transformers_reads_it(tmp_path: Path, head: str) -> None:
    folder = tied(tmp_path / "model", head)
    model = ours(folder)
    assert (model.lm_head.weight is model.embedding_weight) == (head != "different")
    torch.testing.assert_close(logits(model), logits(round_to_nf4(transformers_model(folder))), rtol=1e-5, atol=1e-5)


def test_another_head_is_another_model(tmp_path: Path) -> None:
    """Or the tests here could not fail."""
    one, other = (logits(ours(tied(tmp_path / head, head))) for head in ("equal", "different"))
    assert (one - other)[..., -1].abs().min() > 1e-3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
def test_a_quantized_checkpoint_says_what_it_holds(tmp_path: Path, form: str, head: str) -> None:
    folder, packed = tied(tmp_path / "model", head), tmp_path / "packed"
    quantize.main(["--model", str(folder), "--output", str(packed), "--format", form])
    assert json.loads((packed / "config.json").read_text())["tie_word_embeddings"] == (head != "different")
    assert torch.equal(logits(ours(packed)), logits(ours(folder)))
    assert_read_by_transformers(packed, load_file(folder / "model.safetensors"))
    assert inspect_path(packed).problems == []


def assert_read_by_transformers(packed: Path, stored: dict[str, Tensor]) -> None:
    """With the embedding and the head that the original held. bitsandbytes multiplies by the layers with an error."""
    embedding = stored.get(EMBEDDING, stored.get(HEAD))
    model = transformers_model(packed)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.lm_head.weight, stored.get(HEAD, embedding))


@pytest.mark.parametrize("head", ["different", "alone"])
def test_a_checkpoint_that_bitsandbytes_packed_keeps_its_head(tmp_path: Path, head: str) -> None:
    folder = tied(tmp_path / "model", head)
    packed = pack_by_bitsandbytes(folder, tmp_path / "packed", "nf4", 64, nested=True)
    assert torch.equal(ours(packed).lm_head.weight, load_file(folder / "model.safetensors")[HEAD])
    assert_read_by_transformers(packed, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("head", ["different", "alone"])
def test_transformers_with_our_layers_keeps_the_head(tmp_path: Path, head: str) -> None:
    folder = tied(tmp_path / "model", head)
    model = transformers_model_packed(folder)
    assert torch.equal(logits(model), logits(round_to_nf4(transformers_model(folder))))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(ours(tmp_path / "saved")), logits(model))


def transformers_model_packed(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QShardedConfig(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("head", "embedding", "shards"),
    [*((head, True, 1 + i % 2) for i, head in enumerate(HEADS)), ("different", False, 1), ("alone", True, 2)],
)
def test_a_merged_checkpoint_answers_as_peft(tmp_path: Path, head: str, embedding: bool, shards: int) -> None:
    """Merging into a tied embedding would change the head, which the adapter does not adapt: they are untied."""
    folder = tied(tmp_path / "model", head)
    adapter = write_adapter(
        tmp_path / "adapter", folder, target_modules=["q_proj", *(["embed_tokens"] if embedding else [])]
    )
    if shards == 2:
        cut(folder)
    expected = logits(PeftModel.from_pretrained(transformers_model(folder), adapter))
    merge.main(["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    merged = tmp_path / "merged"
    torch.testing.assert_close(logits(transformers_model(merged)), expected, rtol=1e-5, atol=1e-5)
    says = json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    assert says == (head != "different" and not embedding)
    assert inspect_path(merged).problems == []
    if shards == 2:
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        files = {file: load_file(merged / file) for file in set(index["weight_map"].values())}
        assert index["metadata"]["total_size"] == sum(t.nbytes for file in files.values() for t in file.values())
        assert {name: file for file, held in files.items() for name in held} == index["weight_map"]


def cut(folder: Path) -> None:
    """Put the one file's tensors into two."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(index.values()):
        save_file({n: w for n, w in weights.items() if index[n] == file}, folder / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    described = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))


@pytest.mark.parametrize("head", HEADS)
def test_inspect_finds_them_sound_and_tells_of_a_head_of_its_own(tmp_path: Path, head: str) -> None:
    report = inspect_path(tied(tmp_path / "model", head))
    assert report.problems == []
    assert any("lm_head.weight differs" in note for note in report.notes) == (head == "different")


def test_the_plan_counts_a_head_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for name, head, ties in (("different", "different", True), ("equal", "equal", True), ("untied", "absent", False)):
        folder = tied(tmp_path / name, head, tie_word_embeddings=ties, vocab_size=20000)
        flags = ["--dry-run", "--gpus", "1", "--gpu-memory-gib", "80", "--max-length", "64"]
        with pytest.raises(SystemExit):
            train.main(["--model", str(folder), *flags])
        (plans[name],) = re.findall(r"embedding and head +([\d.]+)", capsys.readouterr().out)
    assert plans["different"] == plans["untied"] != plans["equal"]


@pytest.mark.parametrize("head", ["different", "alone", "equal"])
def test_gguf_holds_the_head_that_is_used(tmp_path: Path, head: str) -> None:
    gguf = pytest.importorskip("gguf")
    from qsharded.integrations.gguf import write_gguf
    from tests.integrations.test_gguf import read, write_model

    assert gguf
    write_model(tmp_path / "model")
    folder = tied(tmp_path / "model", head, vocab_size=262)
    write_gguf(folder, tmp_path / "model.gguf", "m")
    stored, (_, found) = load_file(folder / "model.safetensors"), read(tmp_path / "model.gguf")
    assert torch.equal(found["token_embd.weight"], stored.get(EMBEDDING, stored[HEAD]))
    assert ("output.weight" in found) == (head == "different")
    if head == "different":
        assert torch.equal(found["output.weight"], stored[HEAD])


def refusal(folder: Path, adapter: Path) -> str:
    """What this rank says of an adapter of which one rank's row is damaged."""
    lora, mesh = read_lora_config(adapter), init_device_mesh("cpu", (2,))
    model = load(folder, mesh=mesh, lora=lora, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="holds NaN or infinity") as raised:
        load_adapter(model, adapter)
    return str(raised.value)


def test_ranks_refuse_a_damaged_adapter_in_the_same_words(tmp_path: Path) -> None:
    folder = tied(tmp_path / "model", "absent")
    adapter = write_adapter(tmp_path / "adapter", folder, target_modules=["q_proj", "embed_tokens"])
    path, name = adapter / "adapter_model.safetensors", "base_model.model.model.embed_tokens.lora_embedding_B"
    weights = load_file(path)
    weights[name][-1, 0] = torch.nan  # in a row of the last rank's
    save_file(weights, path, metadata={"format": "pt"})
    said = run_ranks(refusal, 2, folder, adapter)
    assert said[0] == said[1]
    assert name in said[0]


def on_ranks(folder: Path, adapter: Path) -> list[tuple[bool, Tensor, Tensor]]:
    """(tied, head, logits) with an adapter on the embedding, gathered and split; rows are compared a few at a time."""
    read_ahead.PIECE = 3000
    mesh, found = init_device_mesh("cpu", (2,)), []
    for layout in (Layout(), Layout(vocab_parallel=True)):
        model = load(
            folder, mesh=mesh, lora=read_lora_config(adapter), dtype=torch.float32, device="cpu", layout=layout
        )
        load_adapter(model, adapter)
        head = whole(model.lm_head.weight.detach())
        found.append((model.config.tie_word_embeddings, head, logits(model)))
    return found


@pytest.mark.parametrize("head", ["different", "equal", "alone"])
def test_ranks_decide_alike_though_one_row_alone_differs(tmp_path: Path, head: str) -> None:
    """The differing row is the last rank's; the adapter's part of a split embedding is computed on every rank."""
    folder = tied(tmp_path / "model", head)
    adapter = write_adapter(tmp_path / "adapter", folder, target_modules=["q_proj", "embed_tokens"])
    expected = logits(PeftModel.from_pretrained(round_to_nf4(transformers_model(folder)), adapter))
    stored = load_file(folder / "model.safetensors")[HEAD]
    for ties, weight, said in (case for rank in run_ranks(on_ranks, 2, folder, adapter) for case in rank):
        assert ties == (head != "different")
        assert torch.equal(weight, stored)
        torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)
