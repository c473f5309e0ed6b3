"""The Triton kernels against the reference, bit for bit; interpreted where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qsharded.quant import formats
from qsharded_kernels import triton_nf4
from tests.kernels import cases

# numpy, which interprets the kernels, warns of the overflows and NaN that some cases hold
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """In this mode PyTorch fills new memory with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_quantizes(weight: Tensor) -> None:
    expected_codes, expected_absmax = formats.quantize_blocks(weight.contiguous())
    codes, absmax = triton_nf4.quantize(weight.to(DEVICE), formats.thresholds(DEVICE))
    cases.assert_same_bits(codes.cpu(), expected_codes)
    cases.assert_same_bits(absmax.cpu(), expected_absmax)


def assert_dequantizes(encoded: cases.Encoded, dtype: torch.dtype) -> None:
    arguments = [argument if argument is None else on_device(argument) for argument in encoded.arguments()]
    cases.assert_same_bits(triton_nf4.dequantize(*arguments, dtype).cpu(), encoded.expected(dtype))


def on_device(tensor: Tensor) -> Tensor:
    """With its strides, which ``to`` alone would drop."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_quantize_equals_reference(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_quantizes(cases.random_weight(shape, dtype))


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_quantize_hard_blocks(dtype: torch.dtype) -> None:
    assert_quantizes(cases.hard_weight(dtype))


def test_quantize_every_half() -> None:
    assert_quantizes(cases.every_finite_half())


def test_quantize_strided_weight() -> None:
    assert_quantizes(cases.random_weight((64, 128), torch.bfloat16).t()[::2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_weight_shows_in_absmax(bad: float) -> None:
    weight = torch.ones(2, 128, device=DEVICE)
    weight[1, 70] = bad
    _, absmax = triton_nf4.quantize(weight, formats.thresholds(DEVICE))
    assert absmax.isfinite().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_dequantize_equals_reference(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_dequantizes(cases.double_quantized(shape[0], shape[1] // 64), dtype)


@pytest.mark.parametrize("quant_type", formats.CODEBOOKS)
@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_dequantize_every_pair_of_bytes(dtype: torch.dtype, quant_type: str) -> None:
    assert_dequantizes(cases.every_pair_of_bytes(quant_type), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_ties_to_even(dtype: torch.dtype) -> None:
    encoded, expected = cases.rounding_ties(dtype)
    cases.assert_same_bits(encoded.expected(dtype), expected)
    assert_dequantizes(encoded, dtype)


def test_absmax_is_not_fused() -> None:
    encoded = cases.double_quantized(31, 9)
    assert not torch.equal(cases.fused_absmax(encoded), encoded.dequantized_absmax)
    assert_dequantizes(encoded, torch.float32)
