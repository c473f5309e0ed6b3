"""What a merge says of the model that it has written: how far it is from the base with the adapter beside it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import qsharded
from qsharded import merge
from qsharded.calibration.layer_walk import LayerWalk
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import WEIGHTS_FILE, read_lora_config
from qsharded.checkpoint.initial_adapter import initial_metadata, write_initial
from qsharded.checkpoint.merging import Merge, opened
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.cli import merged_logits
from qsharded.cli.check_rows import MOST_ROWS, check_rows
from qsharded.cli.merged_logits import Distance, LogitsDiffer, Merged, distance
from qsharded.data import Tokenizer
from qsharded.merge import MergeConfig
from qsharded.models.choice import read_config
from qsharded.utils.untrusted_json import read_json
from tests.adapters import recast, transformers_model, write_adapter
from tests.checkpoints import write_checkpoint
from tests.models.architectures import write_architecture

BUILTIN = Path(qsharded.__file__).parent / "builtin" / "model"
IDS = torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(1))


def merged(checkpoint: Path, adapter: Path, output: Path, **options: Any) -> Path:
    merge.run(MergeConfig(model=str(checkpoint), adapter=str(adapter), output=str(output), **options))
    return output


def measured(checkpoint: Path, adapter: Path, folder: Path, ids: Tensor = IDS, base: Any = "16bit") -> Distance:
    """Of the model in ``folder``, whatever made it."""
    config, source = open_tied(folder, read_config(read_json(folder / "config.json")))
    with opened(checkpoint, adapter, base) as pair:
        return distance(pair, read_lora_config(adapter), Merged(config, source, is_exact=True), ids)


@torch.no_grad()
def test_it_is_the_distance_of_pefts_model_from_transformers(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_checkpoint(tmp_path / "model", shards=3)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, target_modules="all-linear")
    folder = merged(checkpoint, adapter, tmp_path / "merged", check_rows=0)
    beside = PeftModel.from_pretrained(transformers_model(checkpoint, torch.float32), adapter).eval()
    expected, got = beside(input_ids=IDS).logits, transformers_model(folder, torch.float32)(IDS).logits
    found = measured(checkpoint, adapter, folder)
    assert (found.rows, found.tokens) == (3, 24)
    # the order of sums in fp32 moves logits by 1e-6 of them, and these distances, some 1e-3, by that
    assert found.largest == pytest.approx((expected - got).abs().max().item(), rel=0.02)
    chances, others = expected.double().softmax(-1), got.double().softmax(-1)
    divergence = (chances * (chances / others).log()).sum(-1).mean().item()
    assert found.mean_kl == pytest.approx(divergence, rel=0.02)
    assert found.same_top == (expected.argmax(-1) == got.argmax(-1)).float().mean()


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "saved": ({}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied-embedding": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-head": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "tied": ({"tie_word_embeddings": True}, {}),
}


@pytest.mark.parametrize("base", ["16bit", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_fp32_a_merged_model_is_base_and_adapter(tmp_path: Path, kind: str, base: Any) -> None:
    (tmp_path / "model").mkdir()
    config, adapted = KINDS[kind]
    checkpoint = recast(write_checkpoint(tmp_path / "model", **config), torch.float32)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **adapted)
    folder = merged(checkpoint, adapter, tmp_path / "merged", base=base, check_rows=0)
    scale = load_model(checkpoint, dtype=torch.float32, device="cpu")(IDS).abs().max().item()
    assert measured(checkpoint, adapter, folder, base=base).largest < 1e-4 * scale
    assert measured(checkpoint, adapter, checkpoint, base=base).largest > 1e-2 * scale


def test_what_an_adapter_began_with_counts_as_part_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = recast(write_checkpoint(tmp_path / "model"), torch.float32)
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    weights = load_file(adapter / WEIGHTS_FILE)
    began = write_initial(adapter, {name: 0.7 * weight for name, weight in weights.items()})
    save_file(weights, adapter / WEIGHTS_FILE, metadata={"format": "pt", **initial_metadata(began)})
    found = measured(checkpoint, adapter, merged(checkpoint, adapter, tmp_path / "merged", check_rows=0))
    assert found.largest < 1e-4
    assert measured(checkpoint, adapter, checkpoint).largest > 0.1


def test_models_of_transformers_code_are_compared_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = write_architecture(tmp_path / "model", "gpt_neox")
    adapter = write_adapter(tmp_path / "adapter", checkpoint, target_modules=["query_key_value"])
    vocabulary = read_json(checkpoint / "config.json")["vocab_size"]
    found = measured(checkpoint, adapter, merged(checkpoint, adapter, tmp_path / "merged"), IDS % vocabulary)
    assert found.mean_kl < 1e-3


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return BUILTIN, write_adapter(tmp_path / "adapter", BUILTIN)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("options", [{}, {"format": "gguf", "gguf_type": "f16"}], ids=["safetensors", "gguf"])
def test_a_merge_that_loses_a_tensor_is_told_and_leaves_nothing(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    true = Merge.tensor
    lost = "model.layers.2.mlp.down_proj.weight"
    monkeypatch.setattr(Merge, "tensor", lambda self, name, w: w if name == lost else true(self, name, w))
    with pytest.raises(LogitsDiffer, match=r"does not answer as the base with its adapter: .* Nothing was written"):
        merged(*pair, tmp_path / "merged", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_rows_of_a_gguf_file_in_another_order_are_told(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("qsharded.integrations.gguf_tensors.neighbours_paired", lambda rows, heads: rows)
    with pytest.raises(LogitsDiffer):
        merged(*pair, tmp_path / "merged", format="gguf")


def test_a_quantized_file_is_measured_and_not_refused(
    tmp_path: Path, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gguf")
    merged(*pair, tmp_path / "merged", format="gguf", gguf_type="q4_0", check_rows=2)
    assert "merged logits, compared with those of base and adapter: largest difference" in said(caplog)
    assert "2 rows of 64 tokens" in said(caplog)


def test_what_is_not_compared_is_said_with_its_reason(
    tmp_path: Path, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(*pair, tmp_path / "unseen", check_rows=0)
    assert "logits" not in said(caplog)
    with monkeypatch.context() as patch:
        patch.setattr(merged_logits, "available_memory", lambda: 2**20)
        merged(*pair, tmp_path / "large")
    assert "merged logits were not compared with those of base and adapter: it takes 0.3 GiB" in said(caplog)

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("its code is strange")

    monkeypatch.setattr(LayerWalk, "run", fails)
    merged(*pair, tmp_path / "strange")
    assert "were not compared with those of base and adapter: its code is strange" in said(caplog)
    for name in ("unseen", "large", "strange"):
        assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.parametrize("rows", ["-1", str(MOST_ROWS + 1)])
def test_a_number_of_rows_out_of_range_is_told(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge.main(["--adapter", "a", "--model", "m", "--output", "o", "--check-rows", rows])
    assert f"--check-rows must be from 0 to {MOST_ROWS}, got {rows}" in capsys.readouterr().err


def test_rows_are_texts_of_one_length_or_random_tokens() -> None:
    tokenizer = Tokenizer.from_folder(BUILTIN)
    ids = check_rows(tokenizer, MOST_ROWS, 262, 4096)
    assert ids.shape == (MOST_ROWS, 64)
    texts = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in ids]
    assert texts[0].startswith("The harbour was quiet")
    assert len(set(texts)) == MOST_ROWS
    assert check_rows(tokenizer, 2, 262, 16).shape == (2, 16)
    for other in (check_rows(tokenizer, 2, 20, 4096), check_rows(None, 2, 20, 4096)):
        assert other.shape == (2, 64)
        assert len(other.unique()) > 10
        assert other.max() < 20


def test_chances_of_a_distance_are_of_each_token() -> None:
    expected = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    got = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    found = merged_logits._of_rows([(expected[0], got[0])])
    half = F.softmax(torch.tensor([0.0, 1.0]), -1)
    assert found.mean_kl == pytest.approx((0.5 * (0.5 / half).log()).sum().item() / 2)
    assert (found.largest, found.same_top, found.rows, found.tokens) == (1.0, 0.5, 1, 2)
