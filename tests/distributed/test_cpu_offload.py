"""Weights in host memory: each layer's are fetched once a pass, the next one's early, and none stay behind."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded.distributed import cpu_offload
from qsharded.distributed.cpu_offload import OffloadedWeights
from qsharded.distributed.placement import materialize
from qsharded.models.activation_checkpointing import recomputed

FORWARD = ["fetch 0", "fetch 1", "run 0", "fetch 2", "run 1", "fetch 3", "run 2", "run 3"]
BACKWARD = ["fetch 3", "fetch 2", "run 3", "fetch 1", "run 2", "fetch 0", "run 1", "run 0"]


class Layer(nn.Module):
    def __init__(self, number: int, events: list[str]) -> None:
        super().__init__()
        self.number, self.events = number, events
        self.frozen = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.trained = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        assert self.frozen[0, 0] == self.number + 1
        self.events.append(f"run {self.number}")
        return (x * self.trained) @ self.frozen


@pytest.fixture
def events() -> list[str]:
    """What happened, in order."""
    return []


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> OffloadedWeights:
    """Of four layers, each full of its number + 1."""
    fetch = OffloadedWeights._fetch

    def told(self: OffloadedWeights, index: int, device: torch.device) -> Any:
        events.append(f"fetch {index}")
        return fetch(self, index, device)

    monkeypatch.setattr(OffloadedWeights, "_fetch", told)
    with torch.device("meta"):
        layers = [Layer(number, events) for number in range(4)]
    weights = OffloadedWeights(layers, None)
    materialize(nn.ModuleList(layers), torch.device("cpu"), set(weights.parameters()))
    for layer in layers:
        nn.init.constant_(layer.frozen, layer.number + 1)
        nn.init.ones_(layer.trained)
    return weights


def run(forwards: list[Any]) -> Tensor:
    x = torch.ones(1, 4)
    for forward in forwards:
        x = forward(x)
    return x.sum()


def test_a_block_is_fetched_once_a_pass_while_the_one_before_it_runs(
    weights: OffloadedWeights, events: list[str]
) -> None:
    forwards = recomputed(weights.forwards, "full")
    for _ in range(2):
        run(forwards).backward()
    assert events == 2 * (FORWARD + BACKWARD)


def test_what_is_fetched_early_does_not_hang_on_what_ran_before(weights: OffloadedWeights, events: list[str]) -> None:
    run(weights.forwards[:3])  # left in the middle, as by an error
    events.clear()
    run(weights.forwards[2:])
    assert events == ["fetch 2", "run 2", "run 3"]  # layer 3 had come already


def test_micro_batches_may_all_go_forward_first(weights: OffloadedWeights, events: list[str]) -> None:
    forwards = recomputed(weights.forwards, "full")
    (run(forwards) + run(forwards)).backward()
    assert len(events) == 4 * 8  # what order backward takes them in is its own affair


def test_evaluation_fetches_as_little(weights: OffloadedWeights, events: list[str]) -> None:
    with torch.no_grad():
        for _ in range(2):
            run(weights.forwards)
    assert events == 2 * FORWARD


def test_nothing_keeps_a_block_that_is_done(weights: OffloadedWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    come: list[weakref.ref[Tensor]] = []
    fill = cpu_offload._fill

    def watched(*args: Any) -> nn.Parameter:
        weight = fill(*args)
        come.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(cpu_offload, "_fill", watched)
    held = weights.parameters()
    loss = run(recomputed(weights.forwards, "full"))
    assert not any(weight() is not None for weight in come)
    loss.backward()
    gc.collect()
    assert len(come) == 8
    assert not any(weight() is not None for weight in come)
    assert all(now is before for now, before in zip(weights.parameters(), held, strict=True))
