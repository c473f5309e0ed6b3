"""Weights whose elements 32 bits do not count, by each kernel on a GPU, against the reference."""

from collections.abc import Iterator

import pytest
import torch

from qsharded.quant import backends, blockwise8, formats
from qsharded.quant.kernels import Kernels
from qsharded.quant.packed_weight import PackedWeight
from tests.kernels import cases

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_library")]

N, K = 2**16 + 64, 2**16  # 2^32 weights and 2^22 over
G = K // 64
ENDS = [slice(0, 64), slice(N - 64, N)]


@pytest.fixture(params=["compiled", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "compiled":
        request.getfixturevalue("needs_cuda_part")
    yield backends.implementations(torch.device("cuda", 0))[request.param]
    torch.cuda.empty_cache()


def test_quantize_and_double_quantize(kernels: Kernels) -> None:
    weight = torch.randn(N, K, dtype=torch.bfloat16, device="cuda")
    codes, absmax = kernels.quantize(weight, formats.NF4_64)
    for rows in ENDS:
        for actual, expected in zip((codes[rows], absmax[rows]), formats.quantize_blocks(weight[rows]), strict=True):
            cases.assert_same_bits(actual, expected)
    assert kernels.absmax is not None
    second_level = kernels.absmax.double_quantize(absmax, blockwise8.thresholds(True, "cuda"))
    for actual, expected in zip(second_level, formats.double_quantize(absmax), strict=True):
        cases.assert_same_bits(actual, expected)


def test_dequantize(kernels: Kernels) -> None:
    codes = torch.randint(256, (N, K // 2), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(256, (N, G), dtype=torch.uint8, device="cuda")
    scales, offset = torch.rand(N * G // 256, device="cuda"), torch.tensor(0.7, device="cuda")
    weight = kernels.dequantize(PackedWeight(codes, absmax, scales, offset, formats.NF4_64), torch.bfloat16, None)
    for rows in ENDS:
        own_scales = scales[rows.start * G // 256 : rows.stop * G // 256]
        expected = formats.dequantize_blocks(
            codes[rows], formats.dequantize_absmax(absmax[rows], own_scales, offset), torch.bfloat16
        )
        cases.assert_same_bits(weight[rows], expected)
