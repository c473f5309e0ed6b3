"""Checkpoints whose files are fine and unusual: transformers is the reference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded import merge, quantize
from qsharded.checkpoint import load_model
from qsharded.checkpoint.fingerprint import Fingerprint
from qsharded.checkpoint.report import inspect_path
from qsharded.checkpoint.source import INDEX, SafetensorsFolder
from tests.adapters import recast, transformers_model, write_adapter
from tests.checkpoints import write_checkpoint

SINGLE = "model.safetensors"
IDS = torch.arange(24).view(2, 12) * 7 % 97


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        said = model(IDS)
    return getattr(said, "logits", said)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    weights = load_file(folder / SINGLE)
    save_file({change(name): weight for name, weight in weights.items()}, folder / SINGLE, metadata={"format": "pt"})


def assert_as_transformers_reads_it(folder: Path) -> None:
    theirs = transformers_model(folder).state_dict()
    source = SafetensorsFolder(folder)
    assert set(source.names()) <= theirs.keys()
    assert all(torch.equal(source.whole(name), theirs[name]) for name in source.names())
    assert load_model(folder, dtype=torch.float32, device="cpu")(IDS).isfinite().all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return recast(write_checkpoint(tmp_path / "model"), torch.float32)


def with_shards(folder: Path, **weights: Tensor) -> list[Path]:
    """Put the same model, with other ``weights``, beside its one file, in shards with an index."""
    held = load_file(folder / SINGLE) | weights
    names, index = sorted(held), {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: held[name] for name in names[number - 1 :: 2]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[number - 1 :: 2], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sorted(folder.glob("model-*.safetensors"))


STALE: dict[str, Callable[[Path], Any]] = {
    "its shards are gone": lambda folder: [path.unlink() for path in with_shards(folder)],
    "a shard is gone": lambda folder: with_shards(folder)[0].unlink(),
    "it is no index": lambda folder: (folder / INDEX).write_text("{}"),
    "it is no JSON": lambda folder: (folder / INDEX).write_text("{"),
    "its shards are the same": with_shards,
    "it names the one file": lambda folder: (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)})
    ),
}


@pytest.mark.parametrize("stale", STALE)
def test_one_file_is_taken_beside_a_stale_index(tmp_path: Path, folder: Path, stale: str) -> None:
    STALE[stale](folder)
    assert_as_transformers_reads_it(folder)
    report = inspect_path(folder)
    assert report.problems == []
    assert any("left aside" in note for note in report.notes)
    adapter = write_adapter(tmp_path / "adapter", folder)
    for command in (merge.main, quantize.main):
        output = tmp_path / command.__module__
        extra = ["--adapter", str(adapter)] if command is merge.main else []
        command(["--model", str(folder), "--output", str(output), *extra])
        assert not (output / INDEX).exists()
        assert inspect_path(output).problems == []


@pytest.mark.parametrize("difference", ["a value", "a name"])
def test_two_whole_and_different_models_are_refused_by_name(folder: Path, difference: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    other = load_file(folder / SINGLE)[name].clone()
    other[-1, -1] += 1
    with_shards(folder, **{name if difference == "a value" else "model.more.weight": other})
    with pytest.raises(ValueError, match="holds two different models") as raised:
        load_model(folder, device="cpu")
    for part in (SINGLE, "model-00001-of-00002.safetensors", INDEX):
        assert part in str(raised.value)


@pytest.mark.parametrize("tied", [False, True])
def test_names_without_their_prefix_are_read_merged_packed_and_recognised(tmp_path: Path, tied: bool) -> None:
    (tmp_path / "model").mkdir()
    folder = recast(write_checkpoint(tmp_path / "model", tie_word_embeddings=tied), torch.float32)
    adapter = write_adapter(tmp_path / "adapter", folder, target_modules=["q_proj", "embed_tokens"])
    usual, prefixed = logits(load_model(folder, dtype=torch.float32, device="cpu")), Fingerprint.of(folder)
    rename(folder, lambda name: name.removeprefix("model."))
    assert_as_transformers_reads_it(folder)
    assert torch.equal(logits(load_model(folder, dtype=torch.float32, device="cpu")), usual)
    assert Fingerprint.of(folder) == prefixed
    assert inspect_path(folder).problems == []
    merge.main(["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    expected = logits(PeftModel.from_pretrained(transformers_model(folder), adapter))
    merged = logits(transformers_model(tmp_path / "merged"))
    # Base and update are summed before the products, not after: fp32's rounding. Unmerged, they differ by far more.
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (usual - expected).abs().max() > 0.1
    quantize.main(["--model", str(folder), "--output", str(tmp_path / "packed")])
    assert torch.equal(logits(load_model(tmp_path / "packed", dtype=torch.float32, device="cpu")), usual)


def test_an_untied_head_that_is_missing_is_named_though_transformers_draws_one(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    del weights["lm_head.weight"]
    save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, folder / SINGLE)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load_model(folder, device="cpu")
