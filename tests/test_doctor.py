"""``qsharded.doctor``: what is broken is told with a remedy and fails; what is not passes, GPU or none."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded import backends, doctor, machine, ops
from qsharded.doctor import Finding

GIB = 2**30


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leave:
        doctor.main([])
    return leave.value.code, capsys.readouterr().out


def test_a_healthy_machine_passes_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = printed(capsys)
    assert status == 0, text
    for line in (f"PyTorch {torch.__version__}", "kernels on cpu: ", "every byte arrives", "GB/s into each rank"):
        assert line in text
    assert "BROKEN" not in text


def test_a_check_that_fails_by_itself_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_first() -> Iterator[Finding]:
        yield Finding("before")
        raise OSError("no such thing")

    def check_second() -> Iterator[Finding]:
        yield Finding("after", "think of it")

    monkeypatch.setattr(doctor, "CHECKS", (check_first, check_second))
    status, text = printed(capsys)
    assert status == 1
    assert [line.split()[0] for line in text.splitlines()] == ["ok", "BROKEN", "->", "note", "->"]
    assert "first: OSError: no such thing" in text


def test_a_note_is_no_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Finding("a", "b")]),))
    assert printed(capsys) == (0, "note    a\n        -> b\n")


def broken(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found = [finding for finding in check() if finding.is_broken]
    assert all(finding.remedy for finding in found)
    return found


@pytest.mark.parametrize(("version", "is_broken"), [("2.10.1", True), ("2.11.0+cu128", False), ("2.16.0", True)])
def test_a_pytorch_out_of_range_is_broken(monkeypatch: pytest.MonkeyPatch, version: str, is_broken: bool) -> None:
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["numpy", "torch<2.16,>=2.11", 'torchx>=9; extra == "x"']
    )
    monkeypatch.setattr(torch, "__version__", version)
    found = broken(doctor.check_versions)
    assert bool(found) == is_broken
    if found:
        assert "pip install 'torch<2.16,>=2.11'" in found[0].remedy


def test_a_driver_without_a_gpu_in_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    assert broken(doctor.check_gpus) == []
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan  2\nGCC: 12\n"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = broken(doctor.check_gpus)
    assert "570.86.15" in finding.text
    assert "built with CUDA" in finding.remedy
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "new enough for CUDA 12.8" in broken(doctor.check_gpus)[0].remedy


def test_kernels_that_write_other_bytes_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert broken(doctor.check_kernels) == []
    quantize = ops.nf4_quantize

    def off_by_one(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = quantize(weight)
        codes[0, 0] ^= 1
        return codes, absmax

    monkeypatch.setattr(ops, "nf4_quantize", off_by_one)
    (finding,) = broken(doctor.check_kernels)
    assert "WHICH WRITE OTHER codes than" in finding.text


def test_who_serves_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = (backends.wanted_backend, backends._kernels)
    monkeypatch.setenv("QSHARDED_BACKEND", "reference")
    for function in caches:
        function.cache_clear()
    try:
        assert backends.serving(torch.device("cpu")).startswith("reference, as QSHARDED_BACKEND asks")
    finally:
        for function in caches:
            function.cache_clear()


def ranks_that(monkeypatch: pytest.MonkeyPatch, **result: Any) -> list[Finding]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    process = SimpleNamespace(**({"returncode": 0, "stdout": "", "stderr": ""} | result))
    monkeypatch.setattr(doctor, "_run", lambda command: process)
    return list(doctor.check_ranks())


def test_ranks_that_find_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"damage": "PyTorch changed 758 bytes", "bytes_per_second": 2e9})
    found = ranks_that(monkeypatch, stdout=f"some warning\n{line}\n")
    assert [(finding.text, finding.is_broken) for finding in found] == [
        ("PyTorch changed 758 bytes", True),
        ("all-gather over 2 ranks over gloo: 2.00 GB/s into each rank", False),
    ]


def test_ranks_that_fail_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    (failed,) = ranks_that(monkeypatch, returncode=1, stderr="warning\nRuntimeError: no route\nmore\n")
    assert failed.is_broken
    assert failed.text.endswith("failed: RuntimeError: no route")

    def hang(command: list[str]) -> None:
        raise subprocess.TimeoutExpired(command, 180)

    monkeypatch.setattr(doctor, "_run", hang)
    (hung,) = doctor.check_ranks()
    assert hung.is_broken
    assert "did not find each other" in hung.text


def test_a_launcher_that_hangs_takes_its_ranks_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launcher that, like torchrun, ends its rank when it is asked to end itself."""
    launcher = """
import signal, subprocess, sys
rank = subprocess.Popen(["sleep", "600"])
def end(*_):
    rank.terminate()
    rank.wait()
    open(sys.argv[1], "w").write("ended")
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
signal.pause()
"""
    monkeypatch.setattr(doctor, "_PATIENCE_S", 2)
    with pytest.raises(subprocess.TimeoutExpired):
        doctor._run([sys.executable, "-c", launcher, str(tmp_path / "said")])
    assert (tmp_path / "said").read_text() == "ended"


def test_little_memory_or_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: GIB)
    monkeypatch.setattr(machine, "free_disk", lambda path: GIB)
    found = list(doctor.check_memory_and_disk())
    assert all(finding.remedy for finding in found)
    assert not any(finding.is_broken for finding in found)
    monkeypatch.setattr(machine, "available_memory", lambda: 100 * GIB)
    monkeypatch.setattr(machine, "free_disk", lambda path: 100 * GIB)
    assert not any(finding.remedy for finding in doctor.check_memory_and_disk())
