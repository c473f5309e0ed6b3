"""Files written part by part against those of the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded.checkpoint.safetensors_writer import SafetensorsFile


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b.codes": torch.randint(256, (5, 3), dtype=torch.uint8),
        "a.codes": torch.randint(256, (7,), dtype=torch.uint8),
        "norm": torch.randn(11).bfloat16(),
        "half": torch.randn(3, 1).half(),
        "scales": torch.randn(4),
        "offset": torch.randn(()),
        'quoted "\u00e4"': torch.randn(2),
    }


def specs(tensors: dict[str, Tensor]) -> dict:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_the_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "ours", specs(tensors)) as file:
        for name in reversed(tensors):
            raw = tensors[name].reshape(-1).view(torch.uint8)
            file.write(name, raw[1:], first=1)
            file.write(name, raw[:1])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_late_tensors_are_read_by_the_library(tmp_path: Path) -> None:
    tensors, late = some_tensors(), {"z": torch.arange(7, dtype=torch.uint8), "y": torch.arange(3, dtype=torch.uint8)}
    with SafetensorsFile(tmp_path / "file", specs(tensors), late) as file:
        for name, tensor in late.items():
            file.append(name, tensor)
        for name, tensor in tensors.items():
            file.write(name, tensor)
    assert file.nbytes == sum(t.nbytes for t in (tensors | late).values())
    read = load_file(tmp_path / "file")
    assert set(file.names()) == read.keys() == (tensors | late).keys()
    for name, tensor in (tensors | late).items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_nothing_is_left_of_an_interrupted_file(tmp_path: Path) -> None:
    def interrupted(tensors: dict[str, Tensor]) -> None:
        with SafetensorsFile(tmp_path / "file", specs(tensors)) as file:
            file.write("norm", tensors["norm"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(some_tensors())
    assert list(tmp_path.iterdir()) == []
