"""What each GPU implementation of the NF4 kernels is held to; CUDA's and Triton's tests are this and their own."""

from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qsharded.quant import formats
from qsharded.quant.codebooks import CODEBOOKS
from tests.kernels import cases


@pytest.mark.usefixtures("poisoned_outputs")
class NF4Suite:
    """To be inherited from.

    Attributes:
        kernels: the module under test.
        device: where it runs.
        shapes: of the weights that are quantized and dequantized.
    """

    kernels: ClassVar[ModuleType]
    device: ClassVar[str]
    shapes: ClassVar[list[tuple[int, int]]] = cases.SHAPES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", self.shapes)

    def moved(self, tensor: Tensor) -> Tensor:
        """With its strides, which ``to`` alone would drop."""
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return empty.copy_(tensor)

    def arguments(self, encoded: cases.Encoded) -> list[Tensor | None]:
        return [tensor if tensor is None else self.moved(tensor) for tensor in encoded.arguments()]

    def assert_quantizes(self, weight: Tensor) -> None:
        expected_codes, expected_absmax = formats.quantize_blocks(weight.cpu().contiguous())
        codes, absmax = self.kernels.quantize(weight.to(self.device), formats.thresholds(self.device))
        cases.assert_same_bits(codes.cpu(), expected_codes)
        cases.assert_same_bits(absmax.cpu(), expected_absmax)

    def assert_dequantizes(self, encoded: cases.Encoded, dtype: torch.dtype) -> None:
        found = self.kernels.dequantize(*self.arguments(encoded), dtype)
        cases.assert_same_bits(found.cpu(), encoded.expected(dtype))

    @pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
    def test_quantize_equals_reference(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        self.assert_quantizes(cases.random_weight(shape, dtype))

    @pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
    def test_quantize_hard_blocks(self, dtype: torch.dtype) -> None:
        self.assert_quantizes(cases.hard_weight(dtype))

    def test_quantize_every_half(self) -> None:
        self.assert_quantizes(cases.every_finite_half())

    def test_quantize_strided_weight(self) -> None:
        self.assert_quantizes(self.moved(cases.random_weight((64, 128), torch.bfloat16)).t()[::2])

    @pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_bad_weight_shows_in_absmax(self, bad: float, dtype: torch.dtype) -> None:
        weight = torch.ones(2, 128, device=self.device, dtype=dtype)
        weight[1, 70] = bad
        _, absmax = self.kernels.quantize(weight, formats.thresholds(self.device))
        assert absmax.isfinite().tolist() == [[True, True], [True, False]]

    @pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
    def test_dequantize_equals_reference(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        self.assert_dequantizes(cases.double_quantized(shape[0], shape[1] // 64), dtype)

    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    @pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
    def test_dequantize_every_pair_of_bytes(self, dtype: torch.dtype, quant_type: str) -> None:
        self.assert_dequantizes(cases.every_pair_of_bytes(quant_type), dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dequantize_rounds_ties_to_even(self, dtype: torch.dtype) -> None:
        encoded, expected = cases.rounding_ties(dtype)
        cases.assert_same_bits(encoded.expected(dtype), expected)
        self.assert_dequantizes(encoded, dtype)

    def test_absmax_is_not_fused(self) -> None:
        encoded = cases.double_quantized(31, 9)
        assert not torch.equal(cases.fused_absmax(encoded), encoded.dequantized_absmax)
        self.assert_dequantizes(encoded, torch.float32)
