"""Chunks: a checkpoint is the same bytes in whatever chunks it is read and written."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded.checkpoint import load_model, read_ahead
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.row_chunks import RowChunk, row_chunks_of
from qsharded.checkpoint.source import SafetensorsFolder
from tests.checkpoints import write_checkpoint

CPU = torch.device("cpu")


def state_bytes(folder: Path, device: str = "cpu", **options: bool) -> dict[str, Tensor]:
    model = load_model(folder, dtype=torch.bfloat16, device=device, **options)
    return {name: t.contiguous().reshape(-1).view(torch.uint8).cpu() for name, t in model.state_dict().items()}


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, shards=2, hidden_size=192, intermediate_size=320)


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
def test_chunks_change_no_byte(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int) -> None:
    """A byte is less than a row, so that chunks are single rows."""
    expected = state_bytes(folder)
    monkeypatch.setattr(read_ahead, "PIECE", chunk)
    assert_same_bytes(state_bytes(folder), expected)
    for form in ("qsharded", "bitsandbytes"):
        (tmp_path / form).mkdir()
        quantize_checkpoint(folder, tmp_path / form, form, CPU)
        assert_same_bytes(state_bytes(tmp_path / form), expected)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_value_that_is_not_finite_is_found_in_any_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In the first row, the chunks behind it sound: what was seen of one chunk must outlive the next."""
    folder = write_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    monkeypatch.setattr(read_ahead, "PIECE", 1000)
    with pytest.raises(ValueError, match=f"{re.escape(name)} holds NaN"):
        load_model(folder)
    (tmp_path / "packed").mkdir()
    with pytest.raises(ValueError, match=f"{re.escape(name)} holds NaN"):
        quantize_checkpoint(folder, tmp_path / "packed", "qsharded", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1000, 64 << 20])
def test_on_a_gpu_too(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int) -> None:
    expected = state_bytes(folder)
    monkeypatch.setattr(read_ahead, "PIECE", chunk)
    assert_same_bytes(state_bytes(folder, "cuda"), expected)
    for form in ("qsharded", "bitsandbytes"):
        (tmp_path / form).mkdir()
        quantize_checkpoint(folder, tmp_path / form, form, torch.device("cuda"))
        assert_same_bytes(state_bytes(tmp_path / form, "cuda"), expected)


def test_pieces_begin_at_multiples_and_cover_the_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SafetensorsFolder(folder)
    monkeypatch.setattr(read_ahead, "PIECE", 4 * 384 + 100)
    cut = [(3, 4), (4, 8), (8, 12), (12, 13)]
    assert row_chunks_of(source, "w", 3, 13, 384) == [RowChunk("w", start, stop, 384) for start, stop in cut]
    assert row_chunks_of(source, "w", 4, 8, 384) == [RowChunk("w", 4, 8, 384)]
    assert row_chunks_of(source, "w", 5, 7, 384) == [RowChunk("w", 5, 7, 384)]
    assert row_chunks_of(source, "w", 8, 8, 384) == []


def test_no_more_than_a_few_pieces_are_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read goes into one of the staging buffers: the memory that they name is all that is read into."""
    monkeypatch.setattr(read_ahead, "PIECE", 1000)
    read, memory = SafetensorsFolder.read_into, set()

    def watch(self: SafetensorsFolder, name: str, first: int, raw: Tensor) -> None:
        memory.add(raw.data_ptr())
        assert raw.numel() <= 1000
        read(self, name, first, raw)

    monkeypatch.setattr(SafetensorsFolder, "read_into", watch)
    load_model(folder, dtype=torch.bfloat16)
    assert len(memory) == 4
