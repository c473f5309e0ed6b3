"""Which layers of a model are fused, and when."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded.fused import forwards
from qsharded.fused.forwards import layer_forwards
from qsharded.fused.projections import is_projection
from qsharded.lora.layer import LoRALinear
from qsharded.models.decoder import DecoderLayer
from qsharded.nn import LoRAConfig
from qsharded.utils.checkpointing_modes import KEEP_ALL
from tests.fused.test_layer import CONFIG, activations, inputs_of, layer_of


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for each layer that ran fused."""
    forward, calls = forwards.fused_forward, []

    def counted(*args: Any) -> Tensor:
        calls.append(True)
        return forward(*args)

    monkeypatch.setattr(forwards, "fused_forward", counted)
    return calls


def run(layer: DecoderLayer, x: Tensor) -> None:
    (forward,) = layer_forwards([layer], [layer.forward], KEEP_ALL)
    forward(x, inputs_of(CONFIG))


def adapted(**lora: Any) -> DecoderLayer:
    return layer_of(CONFIG, LoRAConfig(r=2, **lora))


@pytest.mark.parametrize(
    ("layer", "requires_grad", "is_fused"),
    [
        (adapted, False, True),  # the first one of a model, whose input trains nothing
        (lambda: layer_of(CONFIG), True, True),  # without an adapter, before one with one
        (lambda: layer_of(CONFIG), False, False),  # nothing trains
        (lambda: adapted(lora_dropout=0.1), True, False),
    ],
)
def test_a_layer_is_fused_where_a_backward_follows(
    fused: list[bool], layer: Callable[[], DecoderLayer], requires_grad: bool, is_fused: bool
) -> None:
    run(layer(), activations().requires_grad_(requires_grad))
    assert bool(fused) == is_fused


def test_a_layer_is_as_it_is_written_without_gradients(fused: list[bool]) -> None:
    with torch.no_grad():
        run(adapted(), activations())
    assert not fused


def test_what_a_fused_layer_returns_is_no_view() -> None:
    """FSDP2 warns of views: an in-place operation on one loses the hook that gathers weights for the backward."""
    (forward,) = layer_forwards([layer := adapted()], [layer.forward], KEEP_ALL)
    out = forward(activations(), inputs_of(CONFIG))
    assert out.requires_grad
    assert out._base is None


def test_an_adapter_that_is_no_sum_is_not_fused() -> None:
    class Gated(LoRALinear):
        def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
            return base_output * torch.sigmoid(self.update(x))

    layer = adapted().self_attn.q_proj
    assert is_projection(layer)
    layer.__class__ = Gated
    assert not is_projection(layer)
