"""The compiled CPU kernels against the reference, bit for bit, for every instruction set of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsharded.quant import formats
from qsharded.quant.codebooks import CODEBOOKS
from qsharded_kernels import cpu, cpu_nf4, library
from tests.kernels import cases

pytestmark = pytest.mark.usefixtures("fresh_library", "poisoned_outputs")


@pytest.fixture(params=cpu_nf4.ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> str:
    if cpu_nf4.ISA_NAMES.index(request.param) > cpu.compiled().qsharded_cpu_isa():
        pytest.skip(f"this machine does not run {request.param}")
    return request.param


def assert_quantizes(weight: torch.Tensor, **choices: str | int) -> None:
    expected_codes, expected_absmax = formats.quantize_blocks(weight.contiguous())
    codes, absmax = cpu_nf4.quantize(weight, formats.thresholds(), **choices)
    cases.assert_same_bits(codes, expected_codes)
    cases.assert_same_bits(absmax, expected_absmax)


@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_quantize_equals_reference(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_quantizes(cases.random_weight(shape, dtype), isa=isa)


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_quantize_hard_blocks(isa: str, dtype: torch.dtype) -> None:
    assert_quantizes(cases.hard_weight(dtype), isa=isa)


def test_quantize_every_half(isa: str) -> None:
    assert_quantizes(cases.every_finite_half(), isa=isa)


def test_tie_goes_down(isa: str) -> None:
    weight = torch.zeros(1, 64)
    weight[0, :16] = torch.cat([formats.thresholds(), torch.ones(1)])
    codes, _ = cpu_nf4.quantize(weight, formats.thresholds(), isa=isa)
    assert codes[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


def test_quantize_strided_weight(isa: str) -> None:
    assert_quantizes(cases.random_weight((64, 128), torch.bfloat16).t()[::2], isa=isa)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_weight_shows_in_absmax(isa: str, bad: float) -> None:
    weight = torch.ones(2, 128)
    weight[1, 70] = bad
    _, absmax = cpu_nf4.quantize(weight, formats.thresholds(), isa=isa)
    assert absmax.isfinite().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_dequantize_equals_reference(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    encoded = cases.double_quantized(shape[0], shape[1] // 64)
    cases.assert_same_bits(cpu_nf4.dequantize(*encoded.arguments(), dtype, isa=isa), encoded.expected(dtype))


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_dequantize_every_pair_of_bytes(isa: str, dtype: torch.dtype, quant_type: str) -> None:
    encoded = cases.every_pair_of_bytes(quant_type)
    cases.assert_same_bits(cpu_nf4.dequantize(*encoded.arguments(), dtype, isa=isa), encoded.expected(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_ties_to_even(isa: str, dtype: torch.dtype) -> None:
    encoded, expected = cases.rounding_ties(dtype)
    cases.assert_same_bits(cpu_nf4.dequantize(*encoded.arguments(), dtype, isa=isa), expected)


def test_absmax_is_not_fused(isa: str) -> None:
    encoded = cases.double_quantized(31, 9)
    assert not torch.equal(cases.fused_absmax(encoded), encoded.dequantized_absmax)
    out = cpu_nf4.dequantize(*encoded.arguments(), torch.float32, isa=isa)
    cases.assert_same_bits(out, encoded.expected(torch.float32))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    # 13,500 blocks, 4,096 at a time, and no boundary falls on a row's
    assert_quantizes(cases.random_weight((1500, 576), torch.bfloat16), threads=threads)
    encoded = cases.double_quantized(1500, 9)
    out = cpu_nf4.dequantize(*encoded.arguments(), torch.bfloat16, threads=threads)
    cases.assert_same_bits(out, encoded.expected(torch.bfloat16))


def test_unknown_isa_or_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_nf4, "ISA_NAMES", (*cpu_nf4.ISA_NAMES, "avx1024"))
    weight = torch.ones(1, 64)
    with pytest.raises(ValueError, match="does not run avx1024"):
        cpu_nf4.quantize(weight, formats.thresholds(), isa="avx1024")
    with pytest.raises(ValueError, match="does not run avx1024"):
        cpu_nf4.dequantize(*cases.double_quantized(1, 1).arguments(), torch.float32, isa="avx1024")
    with pytest.raises(KeyError):
        cpu_nf4.quantize(weight.double(), formats.thresholds())


def test_library_is_the_fresh_one(fresh_library: Path) -> None:
    compiled = library.load()
    assert compiled is not None
    assert compiled._name == str(fresh_library)


_THREADS_AFTER_EACH_STEP = """
import os, pathlib, sys, torch
from qsharded.quant import formats
from qsharded_kernels import cpu, cpu_nf4, library
library.PATH = pathlib.Path(sys.argv[1])
def threads(): print(len(os.listdir("/proc/self/task")))
weight = torch.ones(4096, 256)
threads()
cpu_nf4.quantize(weight, formats.thresholds(), threads=3)
threads()
weight.sum()
threads()
"""


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this PyTorch has no OpenMP")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_are_pytorchs(fresh_library: Path) -> None:
    """Else there would be none, or PyTorch's, waiting for their next work, would hold up ours."""
    command = [sys.executable, "-c", _THREADS_AFTER_EACH_STEP, str(fresh_library)]
    started, with_ours, with_pytorchs = map(int, subprocess.check_output(command, text=True).split())
    assert with_ours == started + 2
    assert with_pytorchs <= with_ours
