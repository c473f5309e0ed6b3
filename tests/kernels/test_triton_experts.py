"""What lies between the experts' products, interpreted where there is no GPU, against plain PyTorch."""

import pytest
import torch
from torch import Tensor

from qsharded.quant import expert_rows
from qsharded.quant.expert_rows import silu_product
from qsharded_kernels import triton_experts
from tests.kernels.packed_products import DEVICE, random

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

M, k = 5, 3


def positions() -> Tensor:
    """Of five tokens, of which one is padding."""
    position_Mk = torch.randperm(M * k, dtype=torch.int32).view(M, k)
    position_Mk[2] = -1
    return position_Mk.to(DEVICE)


@pytest.mark.parametrize("D", [8, 1030])
@pytest.mark.parametrize("scored", [True, False])
def test_combine(scored: bool, D: int) -> None:
    y_RD, position_Mk, scores_Mk = random(M * k, D), positions(), random(M, k) if scored else None
    with_nan = y_RD.clone()
    with_nan[sorted(set(range(M * k)) - set(position_Mk.flatten().tolist()))] = torch.nan  # what is no token's
    expected = expert_rows.combine(y_RD.double(), position_Mk, None if scores_Mk is None else scores_Mk.double())
    found = triton_experts.combine(with_nan, position_Mk, scores_Mk).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not expected[2].any()


def test_what_no_expert_computed_is_not_read() -> None:
    nothing = torch.full((4, 8), torch.nan), torch.full((2, 2), -1, dtype=torch.int32)
    for scores in (None, torch.rand(2, 2)):
        assert not expert_rows.combine(*nothing, scores).any()


@pytest.mark.parametrize("J", [24, 1100])
def test_swiglu(J: int) -> None:
    gate, up, grad = (random(7, J) for _ in range(3))
    scores = random(7, 1)[:, 0].contiguous()
    expected = expert_rows.glu_backward(silu_product, gate.double(), up.double(), grad.double(), scores.double())
    found = triton_experts.swiglu_backward(gate, up, grad, scores)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    torch.testing.assert_close(triton_experts.swiglu(gate, up).double(), expected[0], rtol=1e-5, atol=1e-5)


def test_no_rows_are_no_launch() -> None:
    gate = random(0, 8)
    assert triton_experts.swiglu(gate, gate).shape == (0, 8)
    h, grads, dots = triton_experts.swiglu_backward(gate, gate, gate, random(0, 1)[:, 0])
    assert (h.shape, grads.shape, dots.shape) == ((0, 8), (0, 16), (0,))
