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

from qsharded import doctor
from qsharded.cli import doctor_rank
from qsharded.doctor import Finding
from qsharded.quant import backends, ops
from qsharded.utils import hardware

GIB = 2**30


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leave:
        doctor.main([])
    return leave.value.code, capsys.readouterr().out


def test_a_healthy_machine_passes_every_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():  # the tests may hide the GPUs of a machine that has them, with their driver
        monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "no_driver")
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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [hidden] = doctor.check_gpus()
    assert "hides every GPU" in hidden.text
    assert not hidden.is_broken


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


def ranks_that(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, **result: Any) -> list[Finding]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
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


REPORT, FIREWALL, BROKEN_LINK = "no matter of the network", "look for a firewall", "NCCL_P2P_DISABLE=1"


def said(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def failure(error: str, step: str, is_connection: bool) -> dict[str, Any]:
    return {"failed": error, "step": step, "is_connection": is_connection}


JOINED = {"joined": True}
LOST = failure("RuntimeError: [gloo/pair.cc] Connection closed by peer", doctor_rank.PROBE, True)
BUG = failure("IndexError: tuple index out of range", doctor_rank.PROBE, False)
NO_ROUTE = failure("RuntimeError: no route", doctor_rank.JOINING, True)
NO_MEMORY = failure("OutOfMemoryError: CUDA out of memory. Tried to", doctor_rank.SPEED, False)


@pytest.mark.parametrize(
    ("lines", "gpus", "text", "remedy"),
    [
        ([NO_ROUTE], 1, "failed in finding each other: RuntimeError: no route", FIREWALL),
        ([JOINED, BUG], 1, "failed in the gather of packed weights: IndexError: tuple index out of range", REPORT),
        ([JOINED, LOST, BUG], 0, "IndexError: tuple index out of range", REPORT),  # the other rank's death is no cause
        ([JOINED, LOST], 0, "Connection closed by peer", FIREWALL),
        ([JOINED, LOST], 2, "Connection closed by peer", BROKEN_LINK),
        ([JOINED, NO_MEMORY], 2, "CUDA out of memory", "nvidia-smi names them"),
        ([], 0, "failed: ModuleNotFoundError: No module named 'x'", REPORT),  # before a rank says anything
    ],
)
def test_a_failure_of_the_ranks_gets_its_own_remedy(
    monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]], gpus: int, text: str, remedy: str
) -> None:
    stderr = "ModuleNotFoundError: No module named 'x'\n"
    (found,) = ranks_that(monkeypatch, gpus, returncode=1, stdout="a warning\n" + said(*lines), stderr=stderr)
    assert found.is_broken
    assert text in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("printed", "gpus", "text", "remedy"),
    [
        (None, 0, "did not find each other in 180 s", FIREWALL),
        (said(JOINED), 0, "found each other, but did not finish in 180 s", REPORT),
        (said(JOINED), 2, "found each other, but did not finish in 180 s", BROKEN_LINK),
    ],
)
def test_ranks_that_hang(
    monkeypatch: pytest.MonkeyPatch, printed: str | None, gpus: int, text: str, remedy: str
) -> None:
    def hang(command: list[str]) -> None:
        raise subprocess.TimeoutExpired(command, 180, printed)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor, "_run", hang)
    (hung,) = doctor.check_ranks()
    assert hung.is_broken
    assert text in hung.text
    assert remedy in hung.remedy


@pytest.mark.parametrize(
    ("step", "error", "is_connection"),
    [
        ("start_world", RuntimeError("no route\nframe #0: c10"), True),
        ("check_gather", IndexError("tuple index out of range"), False),
        ("check_gather", torch.distributed.DistBackendError("NCCL error: unhandled system error"), True),
        ("_bandwidth", RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
    ],
)
def test_a_rank_says_in_which_step_it_failed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
    error: Exception,
    is_connection: bool,
) -> None:
    def fail(*_: object) -> None:
        raise error

    for name in ("check_gather", "_bandwidth"):
        monkeypatch.setattr(doctor_rank, name, lambda world: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor_rank, step, fail)
    with pytest.raises(type(error)):
        doctor_rank.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    steps = {"start_world": doctor_rank.JOINING, "check_gather": doctor_rank.PROBE, "_bandwidth": doctor_rank.SPEED}
    assert line == failure(f"{type(error).__name__}: {str(error).splitlines()[0]}", steps[step], is_connection)


def test_a_launcher_that_hangs_takes_its_ranks_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launcher that, like torchrun, ends its rank when it is asked to end itself."""
    launcher = """
import signal, subprocess, sys
print("joined", flush=True)
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
    with pytest.raises(subprocess.TimeoutExpired) as late:
        doctor._run([sys.executable, "-c", launcher, str(tmp_path / "said")])
    assert late.value.output == "joined\n"
    assert (tmp_path / "said").read_text() == "ended"


def test_little_memory_or_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory", lambda: GIB)
    monkeypatch.setattr(hardware, "free_disk", lambda path: GIB)
    found = list(doctor.check_memory_and_disk())
    assert all(finding.remedy for finding in found)
    assert not any(finding.is_broken for finding in found)
    monkeypatch.setattr(hardware, "available_memory", lambda: 100 * GIB)
    monkeypatch.setattr(hardware, "free_disk", lambda path: 100 * GIB)
    assert not any(finding.remedy for finding in doctor.check_memory_and_disk())
