"""Which kernels serve, and that QSHARDED_BACKEND decides it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from qsharded import backends, nf4, ops
from qsharded_kernels import cpu, cpu_nf4

Choose = Callable[[str], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    def set_backend(name: str) -> None:
        monkeypatch.setenv("QSHARDED_BACKEND", name)
        forget()

    yield set_backend
    monkeypatch.undo()
    forget()


def forget() -> None:
    for cached in (backends.wanted_backend, backends._kernels, backends._has_fused_linear):
        cached.cache_clear()


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was asked to quantize, as it happens. The compiled library has a stand-in, whether it was built or not."""
    asked: list[str] = []
    encode = nf4.encode
    monkeypatch.setattr(cpu_nf4, "quantize", lambda weight, _: asked.append("compiled") or encode(weight))
    monkeypatch.setattr(nf4, "encode", lambda weight: asked.append("reference") or encode(weight))
    return asked


@pytest.mark.parametrize(("name", "serves"), [("reference", "reference"), ("compiled", "compiled"), ("", "compiled")])
def test_the_one_asked_for_serves(name: str, serves: str, choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: True)
    asked = calls_of(monkeypatch)
    choose(name)
    ops.nf4_quantize(torch.randn(2, 64))
    assert asked == [serves]


def test_one_that_does_not_serve_the_device_is_named(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    for name in ("triton", "compiled"):
        choose(name)
        with pytest.raises(ValueError, match=f"QSHARDED_BACKEND={name} does not serve cpu here; what does: reference"):
            ops.nf4_quantize(torch.randn(2, 64))


def test_an_unknown_one_is_named(choose: Choose) -> None:
    choose("cuda")
    with pytest.raises(ValueError, match="must be one of compiled, triton, reference, got 'cuda'"):
        ops.nf4_quantize(torch.randn(2, 64))


def test_without_a_library_the_reference_serves(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    asked = calls_of(monkeypatch)
    choose("")
    ops.nf4_quantize(torch.randn(2, 64))
    assert asked == ["reference"]
