"""Double quantization by the compiled CUDA kernels against the reference, bit for bit."""

import pytest
import torch
from torch import Tensor

from qsharded import blockwise8, nf4
from qsharded_kernels import cuda, cuda_absmax
from tests.kernels import cases

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_library", "needs_cuda_part")]

SHAPES = [(1, 1), (7, 9), (31, 9), (300, 1), (1, 4096), (33, 45), (1000, 64), (2000, 33)]


def random_absmax(rows: int, blocks_per_row: int) -> Tensor:
    return torch.rand(rows, blocks_per_row, generator=torch.Generator().manual_seed(rows)) + 0.01


def thresholds() -> Tensor:
    return blockwise8.thresholds(True, torch.device("cuda"))


def assert_double_quantizes(absmax: Tensor) -> None:
    actual = cuda_absmax.double_quantize(absmax.cuda(), thresholds())
    for tensor, expected in zip(actual, nf4.double_quantize(absmax), strict=True):
        cases.assert_same_bits(tensor.cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantize_equals_reference(shape: tuple[int, int]) -> None:
    assert_double_quantizes(random_absmax(*shape))


def test_equal_absmax_and_zeros() -> None:
    assert_double_quantizes(torch.full((5, 100), 0.3))
    assert_double_quantizes(torch.zeros(5, 100))


@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_sum_in_row_order_where_the_order_decides(nudge: int) -> None:
    """At 2^53 fp64 drops each 1 that is added in order and keeps their sum, and so does the fp32 of the mean."""
    half_a_step = 2.0**29  # of fp32 at 2^53
    sums = torch.tensor([2.0**53 + half_a_step + 2 * nudge, *[1.0] * 4096], dtype=torch.float64)
    in_order, apart = sums.cumsum(0)[-1].float().item(), (sums[0] + sums[1:].sum()).float().item()
    assert (in_order == apart) == (nudge == 1)
    assert offset_of(sums, 1) == in_order


def offset_of(row_sums: Tensor, values: int) -> float:
    offset = torch.empty((), device="cuda")
    cuda.call("absmax_offset", row_sums.cuda(), row_sums.numel(), values, offset)
    return offset.item()


@pytest.mark.parametrize("shape", SHAPES)
def test_row_sums_run_from_left_to_right(shape: tuple[int, int]) -> None:
    absmax = random_absmax(*shape) * torch.logspace(-18, 18, shape[1])
    cases.assert_same_bits(cuda_absmax.absmax_row_sums(absmax.cuda()).cpu(), nf4.absmax_row_sums(absmax))


@pytest.mark.parametrize(("first", "last"), [(0, 31), (0, 10), (10, 30), (30, 31)])
def test_steps_over_a_ranks_rows(first: int, last: int) -> None:
    absmax = random_absmax(31, 9)
    codes, scales, offset = nf4.double_quantize(absmax)
    own = absmax[first:last]
    expected_maxima = nf4.absmax_scales(own, offset, first_row=first, rows=31)
    maxima = cuda_absmax.absmax_scales(own.cuda(), offset.cuda(), first_row=first, rows=31)
    cases.assert_same_bits(maxima.cpu(), expected_maxima)
    encoded = cuda_absmax.encode_absmax(own.cuda(), scales.cuda(), offset.cuda(), thresholds(), first_row=first)
    cases.assert_same_bits(encoded.cpu(), codes[first:last])
