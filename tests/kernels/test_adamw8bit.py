"""AdamW on 8-bit moments by the CUDA and the Triton kernels against the reference, bit for bit."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded.optim import PagedAdamW8bit, reference, store
from qsharded.optim.arena import BLOCK_BYTES
from qsharded.optim.kernels import step_tables
from qsharded.quant import blockwise8
from qsharded_kernels import cuda_adamw8bit, triton_adamw8bit
from tests.kernels.cases import assert_same_bits
from tests.optim import cases

# numpy, which interprets the Triton kernel, warns of what it computes beside the last value
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SOME_PAGED = {"page_budget": 20 * BLOCK_BYTES, "bucket_bytes": 7 * BLOCK_BYTES}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "cuda":
        request.getfixturevalue("needs_cuda_part")
    module = triton_adamw8bit if request.param == "triton" else cuda_adamw8bit
    monkeypatch.setattr(store, "optimizer_kernels", lambda device: module if device == DEVICE else None)
    return module


def unaligned(tensor: Tensor) -> Tensor:
    """The same one value into its memory, where no wide access may begin."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


def trained(device: torch.device, options: dict[str, Any]) -> PagedAdamW8bit:
    held = [nn.Parameter(p.detach().to(device)) for p in [*cases.parameters(), *cases.parameters(1)]]
    optimizer = PagedAdamW8bit(held, lr=1e-2, weight_decay=0.1, **options)
    for step in range(3):
        for number, gradient in enumerate(cases.hard_gradients([p.cpu() for p in held], step)):
            gradient = gradient.to(device)
            held[number].grad = unaligned(gradient) if number % 3 == 0 else gradient
            if (step, number) in [(0, 2), (1, 0)]:
                held[number].grad = None
        optimizer.step(grad_scale=torch.tensor(torch.nan if step == 1 else 0.7, device=device))
    return optimizer


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", [{}, {"maximize": True, **SOME_PAGED}], ids=["resident", "paged"])
def test_steps_are_the_references(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    actual = trained(DEVICE, options)
    monkeypatch.setattr(store, "optimizer_kernels", lambda device: None)
    expected = trained(torch.device("cpu"), options)
    for one, other in zip(actual.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        assert_same_bits(one.detach().cpu(), other.detach())
        for name, value in actual.parameter_state(one).items():
            assert_same_bits(value.cpu(), expected.parameter_state(other)[name])


@pytest.mark.parametrize("signed", [True, False])
def test_sums_with_the_bits_of_a_magnitude_hold_the_nearest_codes(signed: bool) -> None:
    """At, before and behind every threshold and the beginning of every bin; so beyond 1, where rounding may lead."""
    search = cuda_adamw8bit.search(blockwise8.thresholds(signed), signed)
    least, one = torch.tensor([2.0**-23, 1.0]).view(torch.int32).tolist()
    thresholds = blockwise8.thresholds(signed).abs().view(torch.int32)
    ends = torch.arange(least, one + 1, 1 << 16, dtype=torch.int32)
    magnitudes = torch.cat([thresholds - 1, thresholds, thresholds + 1, ends - 1, ends, ends + 1]).view(torch.float32)
    values = torch.cat([magnitudes, magnitudes.new_tensor([0, 1e-45]), -magnitudes[: magnitudes.numel() * signed]])

    below_zero = (values < 0).long()
    bits = values.abs().clamp(min=2.0**-23).view(torch.int32)
    codes = (search[below_zero, (bits - least) >> 16] + bits >> 16) & 255
    expected = blockwise8.nearest_codes(values, torch.ones(()), signed).int()
    expected -= below_zero * (expected == blockwise8.ZERO_CODE)  # what is below zero stays below
    assert torch.equal(torch.where(values < 0, 255 - codes, codes), expected)
    assert search.shape == (1 + signed, ends.numel())


# factor, both betas and their rests, eps, what decay leaves, the rate and the root's factor of steps 1 and 2
FIRST = [0.5, 0.9, 0.1, 0.99, 0.01, 1e-8, 0.999, 0.1, 10.0]
SECOND = [1.0, 0.9, 0.1, 0.99, 0.01, 1e-8, 0.999, 0.0526, 7.09]


def fresh(count: int, dtype: torch.dtype) -> list[Tensor]:
    """A parameter and its moments before the first step."""
    parameter = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = torch.zeros(count, dtype=torch.uint8), torch.zeros(count // 256)
    return [parameter, codes, codes.clone(), scales, scales.clone()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_cuda_part")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [256, 256 * 1000])
def test_one_parameters_steps_are_the_references(dtype: torch.dtype, count: int) -> None:
    expected = fresh(count, dtype)
    actual = [tensor.to(DEVICE) for tensor in expected]
    for step, coefficients in enumerate([FIRST, SECOND]):
        [gradient] = cases.hard_gradients(expected[:1], step)
        reference.adamw_(expected[0], gradient, reference.Moments(*expected[1:]), torch.tensor(coefficients))
        given = unaligned(gradient.to(DEVICE)) if step else gradient.to(DEVICE)
        cuda_adamw8bit.update_alone(actual[0], given, *actual[1:], coefficients, step_tables(DEVICE))
        assert_same(actual, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_cuda_part")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_parameters_values_without_a_finite_gradient_stay(dtype: torch.dtype) -> None:
    """As do those with a gradient of 0 in a first step without decay."""
    expected, coefficients = fresh(1024, dtype), [*FIRST[:6], 1.0, *FIRST[7:]]
    actual = [tensor.to(DEVICE) for tensor in expected]
    gradient, bad = torch.randn(1024, generator=torch.Generator().manual_seed(2)).to(dtype), [0, 300, 301, 1023]
    gradient[bad] = 0
    reference.adamw_(expected[0], gradient, reference.Moments(*expected[1:]), torch.tensor(coefficients))
    gradient[bad] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).to(dtype)
    cuda_adamw8bit.update_alone(actual[0], gradient.to(DEVICE), *actual[1:], coefficients, step_tables(DEVICE))
    assert_same(actual, expected)
