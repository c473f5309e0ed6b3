"""Double quantization by the CUDA and the Triton kernels against the reference, bit for bit."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from qsharded import blockwise8, nf4
from qsharded_kernels import cuda, cuda_absmax, triton_absmax
from tests.kernels import cases

# numpy, which interprets the Triton kernels, warns of what it computes beside the last value
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SHAPES = [(1, 1), (7, 9), (31, 9), (300, 1), (1, 300), (33, 45), (700, 5)]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "triton":
        return triton_absmax
    request.getfixturevalue("needs_cuda_part")
    return cuda_absmax


def random_absmax(rows: int, blocks_per_row: int) -> Tensor:
    return torch.rand(rows, blocks_per_row, generator=torch.Generator().manual_seed(rows)) + 0.01


def thresholds() -> Tensor:
    return blockwise8.thresholds(True, DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
def test_row_sums_run_from_left_to_right(kernels: ModuleType, shape: tuple[int, int]) -> None:
    absmax = random_absmax(*shape) * torch.logspace(-18, 18, shape[1])
    cases.assert_same_bits(kernels.absmax_row_sums(absmax.to(DEVICE)).cpu(), nf4.absmax_row_sums(absmax))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_codes_of_a_whole_weight(kernels: ModuleType, shape: tuple[int, int]) -> None:
    assert_steps(kernels, random_absmax(*shape), 0, shape[0])


@pytest.mark.parametrize(("first", "last"), [(0, 10), (10, 30), (30, 31), (31, 31)])
def test_scales_and_codes_of_a_ranks_rows(kernels: ModuleType, first: int, last: int) -> None:
    assert_steps(kernels, random_absmax(31, 9), first, last)


def test_scales_and_codes_of_equal_values_and_zeros(kernels: ModuleType) -> None:
    assert_steps(kernels, torch.full((5, 100), 0.3), 0, 5)
    assert_steps(kernels, torch.zeros(5, 100), 0, 5)


def assert_steps(kernels: ModuleType, absmax: Tensor, first: int, last: int) -> None:
    codes, scales, offset = nf4.double_quantize(absmax)
    own, on_device = absmax[first:last], absmax[first:last].to(DEVICE)
    rows = absmax.shape[0]
    maxima = kernels.absmax_scales(on_device, offset.to(DEVICE), first_row=first, rows=rows)
    cases.assert_same_bits(maxima.cpu(), nf4.absmax_scales(own, offset, first_row=first, rows=rows))
    encoded = kernels.encode_absmax(on_device, scales.to(DEVICE), offset.to(DEVICE), thresholds(), first_row=first)
    cases.assert_same_bits(encoded.cpu(), codes[first:last])


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_cuda_part")
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantize_in_one_go(shape: tuple[int, int]) -> None:
    absmax = random_absmax(*shape)
    actual = cuda_absmax.double_quantize(absmax.to(DEVICE), thresholds())
    for tensor, expected in zip(actual, nf4.double_quantize(absmax), strict=True):
        cases.assert_same_bits(tensor.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_cuda_part")
@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_sum_in_row_order_where_the_order_decides(nudge: int) -> None:
    """At 2^53 fp64 drops each 1 that is added in order and keeps their sum, and so does the fp32 of the mean."""
    half_a_step = 2.0**29  # of fp32 at 2^53
    sums = torch.tensor([2.0**53 + half_a_step + 2 * nudge, *[1.0] * 4096], dtype=torch.float64)
    in_order, apart = sums.cumsum(0)[-1].float().item(), (sums[0] + sums[1:].sum()).float().item()
    assert (in_order == apart) == (nudge == 1)
    offset = torch.empty((), device=DEVICE)
    cuda.call("absmax_offset", sums.to(DEVICE), sums.numel(), 1, offset)
    assert offset.item() == in_order
