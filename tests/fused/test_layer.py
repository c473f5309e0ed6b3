"""A fused layer against the layer as it is written: the same output and the same gradients, whatever is kept."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded.fused.layer import can_fuse, fused_forward
from qsharded.fused.policy import EVERYTHING, Policy
from qsharded.models.attention_inputs import AttentionInputs, attention_inputs
from qsharded.models.config import ModelConfig, NormNames
from qsharded.models.decoder import DecoderLayer
from qsharded.models.rope import RopeConfig
from qsharded.nn import LoRAConfig, add_lora, quantize_

ROWS, LENGTH, WIDTH = 2, 16, 128
# products in fp64 in another order
TOLERANCE = 1e-12
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=WIDTH,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
)
_AROUND = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_BEHIND = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"layer_windows": (5,)},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "phi3": {"fused_qkv": True, "mlp": "fused"},
    "gemma2": {
        "norms": _AROUND,
        "norm_offset": True,
        "activation": "gelu_tanh",
        "score_softcap": 2.0,
        "attention_scale": 0.3,
        "layer_windows": (5,),
    },
    "gemma3": {"norms": _AROUND, "norm_offset": True, "activation": "gelu_tanh", "qk_norm": True},
    "glm4": {"norms": _AROUND, "mlp": "fused", "rope_interleaved": True, "rope": RopeConfig(rotary_fraction=0.5)},
    "ernie4_5": {"rope_interleaved": True},
    "phi4-mini": {"rope": RopeConfig(rotary_fraction=0.75), "qk_norm": True},
    "exaone4": {"norms": _BEHIND, "qk_norm": True, "layer_ropes": (None,)},
    "granite": {"residual_multiplier": 0.22, "attention_scale": 0.1},
    "sandwich with a multiplier": {"norms": _AROUND, "residual_multiplier": 0.22},
}
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 10, [0] * 9 + [1] * 5 + [-1] * 2])


def layer_of(config: ModelConfig, lora: LoRAConfig | None = None, *, packed: bool = True) -> DecoderLayer:
    """In fp64 but for the packed weights, with nothing at a value that hides a mistake."""
    torch.manual_seed(0)
    layer = DecoderLayer(config, 0)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.5)
    if packed:
        quantize_(layer)
    layer.requires_grad_(False)
    if lora is not None:
        add_lora(layer, lora)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.double()
    return layer


def inputs_of(config: ModelConfig, documents: Tensor | None = None) -> AttentionInputs:
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    return attention_inputs(config, positions, torch.float64, documents_BT=documents)[0]


def activations(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(output: Tensor, layer: DecoderLayer, x: Tensor) -> dict[str, Tensor]:
    """The output and its gradients, by name."""
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(output, [x, *trained.values()], activations(seed=2))
    return {"output": output, "x": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_computes_what_the_layer_does(family: str, documents: Tensor | None) -> None:
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    layer = layer_of(config, LoRAConfig(r=4, rank_pattern={"up_proj": 8}, alpha_pattern={"k_proj": 7.0}, strict=False))
    inputs, x = inputs_of(config, documents), activations().requires_grad_()
    expected = results(layer(x, inputs), layer, x)
    for kept in (EVERYTHING, frozenset(), frozenset({"attention"}), frozenset({"qkv", "h"})):
        assert_same(results(fused_forward(layer, x, inputs, Policy(kept)), layer, x), expected)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "up_proj", "o_proj"]], ids=" ".join)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_any_layer_may_have_an_adapter_or_none(targets: list[str], packed: bool) -> None:
    layer = layer_of(CONFIG, LoRAConfig(r=3, target_modules=targets), packed=packed)
    inputs, x = inputs_of(CONFIG), activations().requires_grad_()
    assert_same(results(fused_forward(layer, x, inputs), layer, x), results(layer(x, inputs), layer, x))


@pytest.mark.parametrize("r", [1, 512])
def test_adapters_of_the_least_and_the_largest_rank(r: int) -> None:
    layer = layer_of(CONFIG, LoRAConfig(r=r))
    inputs, x = inputs_of(CONFIG), activations().requires_grad_()
    assert_same(results(fused_forward(layer, x, inputs), layer, x), results(layer(x, inputs), layer, x))


def test_the_first_layer_of_a_model_gets_no_gradient_for_its_input() -> None:
    layer, inputs = layer_of(CONFIG, LoRAConfig(r=4)), inputs_of(CONFIG)
    x = activations().requires_grad_()
    expected = results(layer(x, inputs), layer, x)
    fused_forward(layer, x.detach(), inputs).backward(activations(seed=2))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys() - {"output", "x"}
    assert_same({**expected, **grads}, expected)


def test_without_gradients_nothing_is_kept() -> None:
    layer, inputs, x = layer_of(CONFIG, LoRAConfig(r=4)), inputs_of(CONFIG), activations()
    with torch.no_grad():
        output = fused_forward(layer, x, inputs)
    assert output.grad_fn is None
    assert (output - layer(x, inputs)).abs().max() < TOLERANCE


class Recorded:
    """An input that waits elsewhere and comes back as a copy."""

    def __init__(self, x: Tensor) -> None:
        self.copy = x.detach().clone()
        x.data.zero_()

    def take(self) -> Tensor:
        return self.copy


def test_the_input_is_taken_back_from_where_it_waits() -> None:
    layer, inputs = layer_of(CONFIG, LoRAConfig(r=4)), inputs_of(CONFIG)
    x = activations().requires_grad_()
    expected = results(layer(x, inputs), layer, x)
    other = activations().requires_grad_()
    assert_same(results(fused_forward(layer, other, inputs, Policy(frozenset(), Recorded)), layer, other), expected)


def test_what_cannot_be_fused() -> None:
    assert can_fuse(layer_of(CONFIG, LoRAConfig(r=4)))
    assert not can_fuse(nn.Linear(2, 2))
    dropout = layer_of(CONFIG, LoRAConfig(r=4, lora_dropout=0.1))
    assert not can_fuse(dropout)
    assert can_fuse(dropout.eval())
    watched = layer_of(CONFIG, LoRAConfig(r=4))
    watched.mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not can_fuse(watched), "the hook would not be called"
    full = layer_of(CONFIG)
    full.mlp.down_proj.bias = nn.Parameter(torch.zeros(WIDTH))
    assert not can_fuse(full), "a bias that trains gets no gradient"
    norm = layer_of(CONFIG, LoRAConfig(r=4))
    norm.input_layernorm.weight.requires_grad_(True)
    assert not can_fuse(norm), "a norm that trains gets no gradient"


def test_a_second_derivative_is_refused() -> None:
    layer, inputs, x = layer_of(CONFIG, LoRAConfig(r=4)), inputs_of(CONFIG), activations().requires_grad_()
    (grad,) = torch.autograd.grad(fused_forward(layer, x, inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
