"""Which kernels serve, and that QSHARDED_BACKEND decides it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qsharded.quant import backends, formats, own_kernels
from qsharded_kernels import cpu, cpu_nf4, cuda_linear, fused_rows
from tests.kernels.cases import assert_same_bits
from tests.quant import flat

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
    for cached in (backends.wanted_backend, backends._kernels):
        cached.cache_clear()


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was asked to quantize, as it happens. The compiled library has a stand-in, whether it was built or not."""
    asked: list[str] = []
    quantize_blocks = formats.quantize_blocks
    monkeypatch.setattr(cpu_nf4, "quantize", lambda weight, _: asked.append("compiled") or quantize_blocks(weight))
    monkeypatch.setattr(
        formats, "quantize_blocks", lambda weight, kind: asked.append("reference") or quantize_blocks(weight, kind)
    )
    return asked


@pytest.mark.parametrize(("name", "serves"), [("reference", "reference"), ("compiled", "compiled"), ("", "compiled")])
def test_the_one_asked_for_serves(name: str, serves: str, choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: True)
    asked = calls_of(monkeypatch)
    choose(name)
    flat.nf4_quantize(torch.randn(2, 64))
    assert asked == [serves]


@pytest.mark.parametrize(
    ("quant_type", "block_size", "expected"),
    [
        ("nf4", 64, ["quantize", "dequantize", "dequantize"]),
        ("fp4", 64, ["dequantize", "dequantize"]),
        ("nf4", 128, []),
        ("fp4", 32, []),
    ],
)
def test_kernels_serve_the_kinds_that_they_are_for(
    quant_type: str, block_size: int, expected: list[str], choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are served by the reference, whatever QSHARDED_BACKEND says."""
    if not cpu.is_available():
        pytest.skip("the CPU's kernels are not built")
    choose("compiled")
    asked: list[str] = []
    for name in ("quantize", "dequantize"):
        kernel = getattr(cpu_nf4, name)
        monkeypatch.setattr(cpu_nf4, name, lambda *a, n=name, k=kernel, **o: asked.append(n) or k(*a, **o))
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    kind = {"quant_type": quant_type, "block_size": block_size}
    codes, absmax = flat.nf4_quantize(weight, **kind)
    dense = formats.quantize(weight, **kind, double_quant=False).dequantize(torch.float32)
    assert_same_bits(flat.nf4_dequantize(codes, absmax, dtype=torch.float32, **kind), dense)
    assert torch.equal(flat.nf4_linear(weight, codes, absmax, **kind), weight @ dense.T)
    assert asked == expected


def test_one_that_does_not_serve_the_device_is_named(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    for name in ("triton", "compiled"):
        choose(name)
        with pytest.raises(ValueError, match=f"QSHARDED_BACKEND={name} does not serve cpu here; what does: reference"):
            flat.nf4_quantize(torch.randn(2, 64))


def test_an_unknown_one_is_named(choose: Choose) -> None:
    choose("cuda")
    with pytest.raises(ValueError, match="must be one of compiled, triton, reference, got 'cuda'"):
        flat.nf4_quantize(torch.randn(2, 64))


def test_without_a_library_the_reference_serves(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    asked = calls_of(monkeypatch)
    choose("")
    flat.nf4_quantize(torch.randn(2, 64))
    assert asked == ["reference"]


@pytest.mark.parametrize("name", ["", "reference"])
def test_double_quantization_whole_and_by_rows(name: str, choose: Choose) -> None:
    """What ranks agree on is put together here as they do it: row sums side by side, scales by their maxima."""
    choose(name)
    absmax = torch.rand(31, 9, generator=torch.Generator().manual_seed(0)) + 0.01
    expected = formats.double_quantize(absmax)
    for actual, wanted in zip(backends.double_quantize(absmax), expected, strict=True):
        assert_same_bits(actual, wanted)
    ranks = [slice(0, 10), slice(10, 10), slice(10, 30), slice(30, 31)]
    sums = torch.cat([backends.absmax_row_sums(absmax[rows]) for rows in ranks])
    offset = backends.absmax_offset(sums, 9)
    maxima = [backends.absmax_scales(absmax[rows], offset, first_row=rows.start, rows=31) for rows in ranks]
    scales = torch.stack(maxima).amax(0)
    codes = [backends.encode_absmax(absmax[rows], scales, offset, first_row=rows.start) for rows in ranks]
    for actual, wanted in zip((torch.cat(codes), scales, offset), expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize(("M", "is_fused"), [(0, False), (1, True), (4, True), (5, False)])
def test_as_many_rows_as_the_table_says_are_fused(M: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def fused(x: Tensor, *packed: Tensor | None, factor: float) -> Tensor:
        asked.append(tuple(x.shape))
        return x.new_zeros(x.shape[0], 7)

    monkeypatch.setattr(backends, "_kernels", lambda device: (own_kernels.CompiledCuda(),))
    monkeypatch.setattr(own_kernels.CompiledCuda, "dequantizes", lambda *_: False)
    monkeypatch.setattr(cuda_linear, "DTYPES", (torch.float32,))
    monkeypatch.setattr(fused_rows, "most_rows", lambda N, K, device: {(7, 128): 4}[N, K])
    monkeypatch.setattr(cuda_linear, "linear", fused)
    codes, absmax = formats.quantize_blocks(torch.randn(7, 128))
    assert flat.nf4_linear(torch.randn(M, 1, 128), codes, absmax).shape == (M, 1, 7)
    assert asked == [(M, 128)] * is_fused
