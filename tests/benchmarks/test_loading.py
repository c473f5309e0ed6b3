"""The loading benchmark's own logic, without looking at a clock."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import loading
from qsharded.checkpoint import load_model

TINY = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}


def test_the_folder_is_as_large_as_asked_for_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.SIZES, "tiny", TINY)
    monkeypatch.setattr(loading, "BYTES_A_FILE", 300_000)
    most = 2_000_000
    size = loading.write_checkpoint(tmp_path, "tiny", most)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size <= most < size + 400_000  # less than one layer more
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert 0 < on_disk - size < 30_000  # headers
    model = load_model(tmp_path)
    assert 0.015 < model.get_submodule("model.layers.1.mlp.up_proj").dequantize().float().std() < 0.025


def ranks(seconds: float, **memory: float) -> list[dict[str, Any]]:
    return [{"seconds": seconds / 2} | memory, {"seconds": seconds} | memory]


@pytest.mark.parametrize(
    ("load", "host", "device", "missed"),
    [
        (3.8, 1.9, 5.9, []),
        (4.0, 1.9, 5.9, ["time"]),
        (3.8, 2.1, 5.9, ["host memory"]),
        (3.8, 1.9, 6.1, ["device memory"]),
    ],
)
def test_the_verdict(load: float, host: float, device: float, missed: list[str]) -> None:
    """Read and quantize take 3 seconds on the slower rank, shard and largest tensor 6 GiB."""
    memory = {"host_gib": host, "device_gib": device, "shard_gib": 4.0, "largest_tensor_gib": 2.0}
    repeat = {"read": ranks(1.0), "quantize": ranks(2.0), "load": ranks(load, **memory)}
    outlier = {"read": ranks(1.0), "quantize": ranks(2.0), "load": ranks(100.0, **memory)}
    assert loading.summary([repeat, outlier, repeat])["missed"] == missed


def test_a_size_that_holds_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"one layer of llama3-70b takes .* GiB: raise --gib"):
        loading.write_checkpoint(tmp_path, "llama3-70b", 1 << 20)
