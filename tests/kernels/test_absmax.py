"""Double quantization by the compiled and the Triton kernels against the reference, bit for bit."""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qsharded.quant import blockwise8, formats
from qsharded_kernels import compiled_absmax, triton_absmax
from tests.kernels import cases

# numpy, which interprets the Triton kernels, warns of what it computes beside the last value
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_outputs")]
SHAPES = [(1, 1), (7, 9), (31, 9), (300, 1), (1, 300), (33, 45), (700, 5)]


@dataclass(frozen=True)
class Kernels:
    module: ModuleType
    device: str

    def thresholds(self) -> Tensor:
        return blockwise8.thresholds(True, self.device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "triton":
        return Kernels(triton_absmax, "cuda" if torch.cuda.is_available() else "cpu")
    request.getfixturevalue("fresh_library" if request.param == "cpu" else "needs_cuda_part")
    return Kernels(compiled_absmax, request.param)


def random_absmax(rows: int, blocks_per_row: int) -> Tensor:
    return torch.rand(rows, blocks_per_row, generator=torch.Generator().manual_seed(rows)) + 0.01


@pytest.mark.parametrize("shape", [(0, 9), *SHAPES])
def test_row_sums_run_from_left_to_right(kernels: Kernels, shape: tuple[int, int]) -> None:
    absmax = random_absmax(*shape) * torch.logspace(-18, 18, shape[1])
    sums = kernels.module.absmax_row_sums(absmax.to(kernels.device)).cpu()
    cases.assert_same_bits(sums, formats.absmax_row_sums(absmax))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_codes_of_a_whole_weight(kernels: Kernels, shape: tuple[int, int]) -> None:
    assert_steps(kernels, random_absmax(*shape), 0, shape[0])


@pytest.mark.parametrize(("first", "last"), [(0, 10), (10, 30), (30, 31), (31, 31)])
def test_scales_and_codes_of_a_ranks_rows(kernels: Kernels, first: int, last: int) -> None:
    assert_steps(kernels, random_absmax(31, 9), first, last)


def test_scales_and_codes_of_equal_values_and_zeros(kernels: Kernels) -> None:
    assert_steps(kernels, torch.full((5, 100), 0.3), 0, 5)
    assert_steps(kernels, torch.zeros(5, 100), 0, 5)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.usefixtures("fresh_library")
def test_threads_of_the_cpu_change_nothing(threads: int) -> None:
    kernels = Kernels(compiled_absmax, "cpu")
    torch.set_num_threads(threads)
    try:
        assert_steps(kernels, random_absmax(10000, 9), 1, 9999)  # in 352 second-level blocks, 128 at a time
        assert_whole(kernels, random_absmax(10000, 9))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantize_in_one_go(kernels: Kernels, shape: tuple[int, int]) -> None:
    assert_whole(kernels, random_absmax(*shape))


@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_sum_in_row_order_where_the_order_decides(kernels: Kernels, nudge: int) -> None:
    """At 2^53 fp64 drops each 1 that is added in order and keeps their sum, and so does the fp32 of a 4,096th."""
    half_a_step = 2.0**29  # of fp32 at 2^53
    sums = torch.tensor([2.0**53 + half_a_step + 2 * nudge, *[1.0] * 4095], dtype=torch.float64)
    in_order, apart = sums.cumsum(0)[-1], sums[0] + sums[1:].sum()
    rounded = [(total / sums.numel()).float().item() for total in (in_order, apart)]
    assert (rounded[0] == rounded[1]) == (nudge == 1)
    assert kernels.module.absmax_offset(sums.to(kernels.device), 1).item() == rounded[0]


def assert_whole(kernels: Kernels, absmax: Tensor) -> None:
    actual = kernels.module.double_quantize(absmax.to(kernels.device), kernels.thresholds())
    for tensor, expected in zip(actual, formats.double_quantize(absmax), strict=True):
        cases.assert_same_bits(tensor.cpu(), expected)


def assert_steps(kernels: Kernels, absmax: Tensor, first: int, last: int) -> None:
    codes, scales, offset = formats.double_quantize(absmax)
    device, rows = kernels.device, absmax.shape[0]
    sums = formats.absmax_row_sums(absmax)
    cases.assert_same_bits(kernels.module.absmax_offset(sums.to(device), absmax.shape[1]).cpu(), offset)
    own = absmax[first:last]
    maxima = kernels.module.absmax_scales(own.to(device), offset.to(device), first_row=first, rows=rows)
    cases.assert_same_bits(maxima.cpu(), formats.absmax_scales(own, offset, first_row=first, rows=rows))
    agreed = scales.to(device), offset.to(device), kernels.thresholds()
    encoded = kernels.module.encode_absmax(own.to(device), *agreed, first_row=first)
    cases.assert_same_bits(encoded.cpu(), codes[first:last])
