"""Weights in host memory: each block's are fetched once a pass, the next one's early, and none stay behind."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from qsharded import streaming
from qsharded.autograd.recompute import recomputed
from qsharded.layout import materialize
from qsharded.streaming import HostWeights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.trained = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.trained) @ self.frozen


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """The weights that came from the host, in their order."""
    come: list[weakref.ref[Tensor]] = []
    fill = streaming._fill

    def watched(*args: object) -> nn.Parameter:
        weight = fill(*args)
        come.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(streaming, "_fill", watched)
    return come


def test_each_pass_fetches_each_block_once_and_keeps_none(fetched: list[weakref.ref[Tensor]]) -> None:
    with torch.device("meta"):
        blocks = [Block() for _ in range(4)]
    weights = HostWeights(blocks, None)
    forwards = recomputed(weights.forwards, "full")
    materialize(nn.ModuleList(blocks), torch.device("cpu"), set(weights.parameters()))
    for number, block in enumerate(blocks):
        nn.init.constant_(block.frozen, number + 1)
        nn.init.ones_(block.trained)
    held = [block.frozen for block in blocks]
    x = torch.ones(1, 4)
    for _ in range(2):
        coming: list[list[float]] = []
        for forward in forwards:
            x = forward(x)
            coming.append([float(weight()[0, 0]) for weight in fetched if weight() is not None])
        assert coming == [[2], [3], [4], []]
        (x.sum() * 1e-6).backward()
        x = torch.ones(1, 4)
        gc.collect()
        assert not any(weight() is not None for weight in fetched)
    assert len(fetched) == 2 * 2 * 4
    assert all(block.frozen is own for block, own in zip(blocks, held, strict=True))
    assert all(block.trained.grad.abs().max() > 0 for block in blocks)


def test_evaluation_fetches_as_little(fetched: list[weakref.ref[Tensor]]) -> None:
    with torch.device("meta"):
        blocks = [Block() for _ in range(3)]
    weights = HostWeights(blocks, None)
    materialize(nn.ModuleList(blocks), torch.device("cpu"), set(weights.parameters()))
    with torch.no_grad():
        for _ in range(2):
            for forward in weights.forwards:
                forward(torch.ones(1, 4))
    assert len(fetched) == 2 * 3
