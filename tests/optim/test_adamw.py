"""AdamW as the trainer calls it: against PyTorch's own clipping and step."""

import pytest
import torch
from torch import nn

from qsharded.optim import AdamW, clipping_scale


def parameters(dtype: torch.dtype, gradient: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    held = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (300,))]
    for parameter in held:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * gradient).to(dtype)
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1000.0])
def test_a_scaled_step_is_torchs_clipping_and_step_to_the_bit(dtype: torch.dtype, max_norm: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(theirs, max_norm, norm)
    torch.optim.AdamW(theirs, lr=0.1).step()
    optimizer = AdamW(ours, lr=0.1)
    optimizer.prefetch()
    optimizer.step(grad_scale=clipping_scale(norm, max_norm))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_step_whose_scale_is_not_finite_changes_nothing() -> None:
    held, before = parameters(torch.float32), parameters(torch.float32)
    optimizer = AdamW(held, lr=0.1)
    optimizer.step(grad_scale=torch.tensor(torch.nan))
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))
    assert not optimizer.state


def test_a_step_without_a_scale_is_torchs() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    assert AdamW(ours).step(lambda: 3.0) == 3.0
    torch.optim.AdamW(theirs).step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
