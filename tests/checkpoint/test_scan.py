"""Reading a safetensors file byte by byte: hashes, values that are not finite, and every way to be damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qsharded.checkpoint import scan
from qsharded.checkpoint.scan import scan_file

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randn(37, 11).to(dtype) for dtype in DTYPES}
    others = {"bytes": torch.arange(99, dtype=torch.uint8), "empty": torch.zeros(0, 3), "one": torch.tensor(2.0)}
    save_file(tensors | others, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def with_bad_value(file: Path, name: str, place: tuple[int, ...], value: float) -> Path:
    from safetensors.torch import load_file

    tensors = load_file(file)
    tensors[name][place] = value
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("chunk", [24, 1 << 24])
def test_a_sound_file_is_hashed_whole(file: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    found = scan_file(file)
    assert found.problems == []
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.size == file.stat().st_size
    shapes = {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes) for tensor in found.tensors}
    assert shapes["torch.bfloat16"] == ("BF16", (37, 11), 37 * 11 * 2)
    assert len(shapes) == 7


@pytest.mark.parametrize("chunk", [24, 1 << 24])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_value_that_is_not_finite_is_placed(
    file: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, value: float
) -> None:
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    with_bad_value(with_bad_value(file, str(dtype), (31, 2), 1 / 0.3), str(dtype), (30, 7), value)
    assert scan_file(file).problems == [f"a.safetensors: {dtype} holds {value} at [30, 7]"]


def test_packed_bytes_are_no_numbers(file: Path) -> None:
    with_bad_value(file, "torch.bfloat16", (0, 0), float("nan"))
    assert scan_file(file, {"torch.bfloat16"}).problems == []


def test_a_file_that_is_cut_off_names_the_tensor(file: Path) -> None:
    content = file.read_bytes()
    last = scan_file(file).tensors[-1]
    file.write_bytes(content[:-3])
    found = scan_file(file)
    assert f"{last.name} is cut off: {last.nbytes - 3} of its {last.nbytes} bytes are there" in found.problems[0]
    assert found.sha256 == hashlib.sha256(content[:-3]).hexdigest()
    file.write_bytes(content + b"12345")
    assert scan_file(file).problems == ["a.safetensors has 5 bytes behind its last tensor"]


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"no json", "its header is no JSON object"),
        (b"[1, 2]", "its header is no JSON object"),
        ({"x": 3}, "its header says of x 3"),
        ({"x": entry("F32", [2], 0, 4)}, "x is F32 [2] in 4 bytes"),
        ({"x": entry("F99", [2], 0, 8)}, "its header says of x"),
        ({"x": entry("F32", [1], 4, 8)}, "x begins at byte 4, not at 0"),
        ({"x": entry("F32", [2], 0, 8), "y": entry("F32", [1], 4, 8)}, "y begins at byte 4, not at 8"),
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: Any, complaint: str) -> None:
    found = scan_file(written(tmp_path / "a.safetensors", header, bytes(8)))
    assert complaint in found.problems[0]
    assert found.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"abc", bytes(8), (10**15).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "is no safetensors file or cut off" in scan_file(tmp_path / "a.safetensors").problems[0]
