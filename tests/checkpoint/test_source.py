"""What a checkpoint folder may look like, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from qsharded.checkpoint import load_model
from qsharded.checkpoint.source import SafetensorsFolder, find_checkpoint
from tests.checkpoints import write_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, shards=2)


def change_index(folder: Path, name: str, file: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_one_file_and_an_index_of_files_read_alike(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    one = SafetensorsFolder(write_checkpoint(tmp_path / "one"))
    three = SafetensorsFolder(write_checkpoint(tmp_path / "three", shards=3))
    assert one.names() == three.names()
    for name in one.names():
        assert torch.equal(one.rows(name, 0, 1000), three.rows(name, 0, 1000))


def test_rows_are_those_asked_for(sharded: Path) -> None:
    source = SafetensorsFolder(sharded)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = load_file(source.file_of(name))[name]
    assert torch.equal(source.rows(name, 5, 9), whole[5:9])
    assert source.rows(name, 7, 7).shape == (0, 128)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../b.safetensors"])
def test_an_index_entry_that_leaves_the_folder_is_refused(sharded: Path, file: str) -> None:
    change_index(sharded, "model.norm.weight", file)
    with pytest.raises(ValueError, match="points outside its folder"):
        load_model(sharded)


@pytest.mark.parametrize("file", [3, None, ["model-00001-of-00002.safetensors"], {}])
def test_an_index_entry_that_is_no_file_name_is_refused(sharded: Path, file: Any) -> None:
    change_index(sharded, "model.norm.weight", file)
    with pytest.raises(ValueError, match=r"weight_map has 'model\.norm\.weight', which must be a string of"):
        load_model(sharded)


def test_an_index_entry_of_another_kind_of_file_is_refused(sharded: Path) -> None:
    change_index(sharded, "model.norm.weight", "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors, which is missing"):
        load_model(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is damaged or incomplete"):
        load_model(sharded)


def test_a_tensor_that_is_not_in_its_file_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in set(index.values()) if file != index["model.norm.weight"])
    change_index(sharded, "model.norm.weight", other)
    with pytest.raises(ValueError, match=r"places model\.norm\.weight in .* which does not hold it"):
        load_model(sharded)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight"),
        ({"model.extra": torch.ones(3)}, r"no place for: model\.extra"),
        ({"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight is \(3,\), config\.json asks for \(128,\)"),
        ({"model.norm.weight": torch.ones(128, dtype=torch.int32)}, r"model\.norm\.weight is I32"),
    ],
)
def test_tensors_must_be_just_those_of_the_model(tmp_path: Path, changes: dict, complaint: str) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=complaint):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "config.json is missing"), ("{", "not valid JSON"), ("[]", "JSON object")]
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, complaint: str) -> None:
    folder = write_checkpoint(tmp_path)
    if content is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_model(folder)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_model(folder)


@pytest.mark.parametrize("name", ["./no/such", "plain", "/a/b", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        find_checkpoint(name)


def test_a_folder_of_something_else_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no model: its config.json is missing")):
        find_checkpoint(".")
    (tmp_path / "tokenizer.json").touch()
    assert find_checkpoint(tmp_path, weights=False) == tmp_path  # enough to preview rows
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="holds an adapter and no model: --adapter takes it"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").touch()
    assert find_checkpoint(tmp_path) == tmp_path


class Hub:
    """A repository with what model makers put into theirs, and what was asked of it and given."""

    FILES = (
        "README.md", "config.json", "consolidated.safetensors", "consolidated.00.safetensors", "pytorch_model.bin",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "original/params.json",
        "original/model.safetensors", "tokenizer.json",
    )  # fmt: skip

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        self.asked = (repo, revision)
        chosen = filter_repo_objects(self.FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.given = sorted(chosen)
        return str(self.snapshot)


def test_a_hub_id_is_downloaded_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(write_checkpoint(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    load_model("owner/name", revision="v2")
    assert hub.asked == ("owner/name", "v2")
    assert hub.given == [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"
    ]  # fmt: skip


def test_random_weights_download_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(write_checkpoint(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    load_model("owner/name", random_init=True)
    assert hub.given == ["config.json", "model.safetensors.index.json", "tokenizer.json"]


def test_what_the_hub_refuses_is_named() -> None:
    with pytest.raises(ValueError, match="owner/name is no local folder, and the Hub did not give it"):
        find_checkpoint("owner/name")  # the tests run offline


def test_a_revision_is_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision 'main' is for Hub ids"):
        find_checkpoint(tmp_path, "main")
