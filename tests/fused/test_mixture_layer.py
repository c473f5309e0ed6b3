"""A layer whose MLP is a mixture of experts: fused up to the mixture, it computes what it is written as."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qsharded.fused import mixture_layer
from qsharded.fused.layer import can_fuse, fused_forward
from qsharded.fused.policy import EVERYTHING, Policy
from qsharded.models.balance import BalanceTally
from qsharded.models.config import ExpertMixture, ModelConfig
from qsharded.models.rope import RopeConfig
from qsharded.nn import LoRAConfig
from tests.fused.test_layer import (
    _AROUND,
    CONFIG,
    DOCUMENTS,
    Recorded,
    activations,
    inputs_of,
    layer_of,
    results,
)

# Routers and the gradients by their scores are in fp32, of fp64 activations that differ by 1e-15.
TOLERANCE = 1e-6
PLAIN = ExpertMixture(experts=5, per_token=2, intermediate_size=64)
SHARED = dataclasses.replace(PLAIN, router="sigmoid", scaling=2.5, shared_size=64)
GPT_OSS = dataclasses.replace(PLAIN, router="softmax of chosen", clamped=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mixture": PLAIN, "qk_norm": True},
    "mixtral": {"mixture": PLAIN, "layer_windows": (5,)},
    "glm4_moe": {"mixture": SHARED, "qkv_bias": True, "qk_norm": True, "rope": RopeConfig(rotary_fraction=0.5)},
    "gpt_oss": {"mixture": GPT_OSS, "sinks": True, "qkv_bias": True, "o_bias": True, "layer_windows": (5,)},
    "sandwich with a multiplier": {"mixture": PLAIN, "norms": _AROUND, "residual_multiplier": 0.22},
}
QWEN3: ModelConfig = dataclasses.replace(CONFIG, **FAMILIES["qwen3_moe"])
POLICIES = [EVERYTHING, frozenset(), frozenset({"attention"}), frozenset({"qkv", "attention", "h"})]
LORA = LoRAConfig(r=4, alpha_pattern={"k_proj": 7.0}, strict=False)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (actual[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_computes_what_the_layer_does(family: str, documents: Tensor | None) -> None:
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    layer, inputs, x = layer_of(config, LORA), inputs_of(config, documents), activations().requires_grad_()
    assert can_fuse(layer)
    expected = results(layer(x, inputs), layer, x)
    for kept in POLICIES:
        assert_same(results(fused_forward(layer, x, inputs, Policy(kept)), layer, x), expected)


@pytest.mark.parametrize("kept", [EVERYTHING, frozenset()], ids=["kept", "again"])
@pytest.mark.parametrize("targets", [["q_proj"], ["experts.gate_up_proj"]], ids=" ".join)
def test_the_first_layer_of_a_model_gets_no_gradient_for_its_input(targets: list[str], kept: frozenset[str]) -> None:
    of_experts = [target for target in targets if "experts" in target]
    named = LoRAConfig(r=4, target_modules=[t for t in targets if t not in of_experts], target_parameters=of_experts)
    layer, inputs, x = layer_of(QWEN3, named), inputs_of(QWEN3), activations().requires_grad_()
    expected = results(layer(x, inputs), layer, x)
    fused_forward(layer, x.detach(), inputs, Policy(kept)).backward(activations(seed=2))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert grads
    assert_same(grads, {name: value for name, value in expected.items() if name not in ("output", "x")})


def test_without_gradients_nothing_is_kept() -> None:
    layer, inputs, x = layer_of(QWEN3, LORA), inputs_of(QWEN3), activations()
    with torch.no_grad():
        output = fused_forward(layer, x, inputs, Policy(frozenset()))
        assert output.grad_fn is None
        assert (output - layer(x, inputs)).abs().max() < TOLERANCE


def test_the_input_is_taken_back_from_where_it_waits() -> None:
    layer, inputs, x = layer_of(QWEN3, LORA), inputs_of(QWEN3), activations().requires_grad_()
    expected = results(layer(x, inputs), layer, x)
    other = activations().requires_grad_()
    assert_same(results(fused_forward(layer, other, inputs, Policy(frozenset(), Recorded)), layer, other), expected)


@pytest.mark.parametrize("kept", [EVERYTHING - {"gate_up"}, frozenset()], ids=["half kept", "again"])
def test_weights_that_are_elsewhere_come_once_a_pass(kept: frozenset[str]) -> None:
    layer, inputs, x = layer_of(QWEN3, LORA), inputs_of(QWEN3), activations().requires_grad_()
    expected = results(layer(x, inputs), layer, x)
    frozen = [parameter for parameter in layer.parameters() if not parameter.requires_grad]
    at_home, came = [parameter.data for parameter in frozen], []

    @contextmanager
    def present(device: torch.device) -> Iterator[None]:
        came.append(device.type)
        for parameter, value in zip(frozen, at_home, strict=True):
            parameter.data = value.clone()
        yield
        away()

    def away() -> None:
        for parameter, value in zip(frozen, at_home, strict=True):
            parameter.data = torch.zeros_like(value)

    away()
    output = fused_forward(layer, x, inputs, Policy(kept, weights_present=present))
    assert came == ["cpu"]
    assert_same(results(output, layer, x), expected)
    assert came == ["cpu"] * 2


def test_a_router_that_trains_and_the_balance_loss_reach_what_is_before_them() -> None:
    """The balance comes out of the mixture beside its output, and its gradient goes in through the router."""
    layer, inputs, x = layer_of(QWEN3, LORA), inputs_of(QWEN3), activations().requires_grad_()
    layer.mlp.gate.weight.requires_grad_(True)
    tally = BalanceTally.of(layer)
    assert can_fuse(layer)

    def found(policy: Policy | None) -> dict[str, Tensor]:
        tally.take()
        output = layer(x, inputs) if policy is None else fused_forward(layer, x, inputs, policy)
        balance = tally.take().probability_E.square().sum()
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(output.sum() * 1e-3 + balance, [x, *trained.values()])
        return {"balance": balance, "x": grads[0], **dict(zip(trained, grads[1:], strict=True))}

    expected = found(None)
    for kept in POLICIES:
        assert_same(found(Policy(kept)), expected)


def test_dropout_of_a_shared_expert_is_drawn_again_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, **FAMILIES["glm4_moe"])
    lora = LoRAConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], lora_dropout=0.3, strict=False)
    layer, inputs, x = layer_of(config, lora), inputs_of(config), activations().requires_grad_()
    assert can_fuse(layer), "its attention has no dropout"

    def found(forward: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return results(forward(), layer, x)

    devices: list[torch.device] = []

    def checkpoint_that_tells(forward: Any, arg: Tensor, **options: Any) -> Tensor:
        devices.append(arg.device)  # PyTorch restores the random state of this one
        return checkpoint(forward, arg, **options)

    monkeypatch.setattr(mixture_layer, "checkpoint", checkpoint_that_tells)
    expected = found(lambda: layer(x, inputs))
    for kept in POLICIES:
        assert_same(found(lambda kept=kept: fused_forward(layer, x, inputs, Policy(kept))), expected)
    assert not torch.equal(layer(x, inputs), expected["output"]), "nothing was dropped"
    assert devices == [x.device] * 3, "in all but the first"


def test_what_of_a_mixture_cannot_be_fused() -> None:
    assert not can_fuse(layer_of(QWEN3, LoRAConfig(r=4, target_modules=["o_proj"], lora_dropout=0.1)))
    sinks = layer_of(dataclasses.replace(CONFIG, **FAMILIES["gpt_oss"]), LORA)
    assert can_fuse(sinks)
    sinks.self_attn.sinks.requires_grad_(True)
    assert not can_fuse(sinks), "sinks that train get no gradient"
    watched = layer_of(QWEN3, LORA)
    watched.mlp.experts.register_forward_hook(lambda *_: None)
    assert can_fuse(watched), "the mixture is called"
