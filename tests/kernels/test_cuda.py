"""Whether the compiled CUDA part is used: machines and libraries of every kind, played by stand-ins."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from qsharded_kernels import cuda, library

DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver


@pytest.fixture(autouse=True)
def gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    cuda._runs_on.cache_clear()
    yield
    cuda._runs_on.cache_clear()


def use_library(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    compiled = type("Compiled", (SimpleNamespace,), {"__hash__": object.__hash__})(**functions)
    monkeypatch.setattr(library, "load", lambda: compiled)


def with_probe(monkeypatch: pytest.MonkeyPatch, result: int) -> None:
    use_library(
        monkeypatch,
        qsharded_cuda_probe=lambda: result,
        qsharded_cuda_error_string=lambda result: b"CUDA driver version is insufficient",
    )


def test_runs_where_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with_probe(monkeypatch, 0)
    assert cuda.is_available()


def test_old_driver_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with_probe(monkeypatch, library.CUDA_ERROR + DRIVER_TOO_OLD)
    assert not cuda.is_available()
    assert not cuda.is_available("cuda:0")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "CUDA driver version is insufficient. Triton serves" in record.message


def test_library_without_a_cuda_part_or_no_library_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_library(monkeypatch, qsharded_cpu_isa=lambda: 0)
    assert not cuda.is_available()
    monkeypatch.setattr(library, "load", lambda: None)
    assert not cuda.is_available()
    assert not caplog.records


def test_no_gpu_is_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with_probe(monkeypatch, library.CUDA_ERROR + DRIVER_TOO_OLD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not cuda.is_available()
    assert not caplog.records
