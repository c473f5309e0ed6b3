"""Manifests: what is read back, and which damage is found."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qsharded.checkpoint.files import FileRecord, TensorParts, write_tensors
from qsharded.checkpoint.manifest import DamagedCheckpoint, Manifest, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files, described by hashes of hashlib's own."""
    (tmp_path / "adapter").mkdir()
    files = {"state.json": b"{}", "adapter/weights": bytes(range(256)) * 20}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    records = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    write_manifest(tmp_path, Manifest(step=7, world_size=2, files=records))
    return tmp_path


def test_an_intact_checkpoint_is_what_its_manifest_says(folder: Path) -> None:
    manifest = verify(folder)
    assert (manifest.step, manifest.world_size, sorted(manifest.files)) == (7, 2, ["adapter/weights", "state.json"])
    assert manifest == read_manifest(folder)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "adapter" / "weights").read_bytes())
    data[3000] ^= 1
    (folder / "adapter" / "weights").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_bit, "adapter/weights is damaged: its SHA-256"),
        (lambda folder: (folder / "adapter" / "weights").write_bytes(b"short"), "adapter/weights has 5 bytes, .* 5120"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "qsharded'), "manifest.json is not valid"),
        (lambda folder: edit_manifest(folder, files=[]), "manifest.json is damaged"),
        (lambda folder: edit_manifest(folder, format="other"), "manifest.json is damaged"),
        (lambda folder: edit_manifest(folder, more=1), "manifest.json is damaged"),
    ],
)
def test_damage_is_found_and_its_file_named(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(folder)
    with pytest.raises(DamagedCheckpoint, match=named):
        verify(folder)


def test_another_layout_is_no_damage(folder: Path) -> None:
    edit_manifest(folder, format_version=3, more=1)
    with pytest.raises(ValueError, match="format_version 3") as caught:
        verify(folder)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_tensor_files_are_safetensors(tmp_path: Path) -> None:
    """The library reads what was written part by part: every dtype, a scalar, an empty tensor."""
    rows = torch.arange(12.0).reshape(6, 2)
    tensors = {
        "whole": torch.tensor([1, -2], dtype=torch.int64),
        "rows": rows,
        "bits": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "half": torch.randn(3, dtype=torch.float16),
    }
    parts = {name: TensorParts(t.dtype, tuple(t.shape), [t]) for name, t in tensors.items()}
    parts["rows"] = TensorParts(torch.float32, (6, 2), [rows[:1], rows[1:1], rows[1:]])
    path = tmp_path / "some.safetensors"
    record = write_tensors(path, parts, {"a": "b"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype
        assert torch.equal(read[name], expected)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"a": "b"}
    data = path.read_bytes()
    assert record == FileRecord(len(data), hashlib.sha256(data).hexdigest())


def as_first_version(folder: Path, **changes: object) -> None:
    """The manifest as it was before it had a hash of itself, changed."""
    path = folder / "manifest.json"
    said = json.loads(path.read_text()) | {"format_version": 1} | changes
    said.pop("manifest_sha256", None)
    path.write_text(json.dumps(said))


def test_any_changed_byte_of_the_manifest_is_found(folder: Path) -> None:
    """Whatever it makes of the meaning: white space, another step, another version, the hash itself."""
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for place, byte in enumerate(whole):
        for other in (byte ^ 1, byte ^ 32, ord("0"), ord(" ")):
            if other != byte:
                path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
                with pytest.raises(ValueError, match=r"manifest\.json"):
                    read_manifest(folder)
    path.write_bytes(whole)
    assert read_manifest(folder).step == 7


def test_a_manifest_cut_off_anywhere_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint):
            read_manifest(folder)


@pytest.mark.parametrize("field", ["step", "world_size", "files", "qsharded_version", "manifest_sha256"])
def test_a_changed_value_in_sound_json_is_found(folder: Path, field: str) -> None:
    for value in (0, "8", None, [], {}, True, "0" * 64):
        edit_manifest(folder, **{field: value})
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is damaged"):
            read_manifest(folder)


def test_checkpoints_of_the_first_version_are_read(folder: Path) -> None:
    manifest = verify(folder)
    as_first_version(folder)
    assert verify(folder) == manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "7"},
        {"step": True},
        {"step": -1},
        {"world_size": 1.5},
        {"files": None},
        {"files": {"state.json": 3}},
        {"files": {"state.json": {"size": "2", "sha256": ""}}},
        {"files": {"../state.json": {"size": 2, "sha256": ""}}},
        {"files": {"/etc/hostname": {"size": 2, "sha256": ""}}},
        {"files": {"state.json": {"size": 2, "sha256": None}}},
        {"more": 1},
    ],
)
def test_the_first_versions_values_are_held_to_their_types(folder: Path, changes: dict[str, object]) -> None:
    as_first_version(folder, **changes)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is damaged"):
        read_manifest(folder)
