from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsharded.utils import hardware


def test_available_memory_is_a_part_of_what_there_is() -> None:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < hardware.available_memory() < int(fields["MemTotal"].split()[0]) * 1024


def test_free_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    there, later = hardware.free_disk(tmp_path), hardware.free_disk(tmp_path / "not" / "yet")
    assert later == pytest.approx(there, rel=0.1)
    assert there > 0


def test_the_smallest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [80, 24, 48]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=sizes[index]))
    assert hardware.gpu_memory() == 24
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert hardware.gpu_memory() is None


def test_ranks_are_torchruns_or_one_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert hardware.default_ranks() == 4
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert hardware.default_ranks() == 16
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert hardware.default_ranks() == 1


def test_the_tightest_control_group_counts_without_its_page_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/slurm/job\n")
    monkeypatch.setattr(hardware, "_GROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_OWN_GROUP", tmp_path / "own")
    whole = hardware.memory()
    for folder, limit, used in ((job, "max", 5), (job.parent, "9000", 8000), (tmp_path, "99000", 8000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert (hardware.available_memory(), hardware.memory()) == (1000, 9000)
    (job.parent / "memory.stat").write_text("anon 1000\ninactive_file 7000\nactive_file 3\n")
    assert hardware.available_memory() == 8000
    (job.parent / "memory.max").unlink()
    (tmp_path / "memory.max").unlink()
    assert hardware.memory() == whole
