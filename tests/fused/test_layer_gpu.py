"""The fused layer's kernels on a GPU, in bf16: as near to fp32 as the composition is, whatever is kept.

Errors are relative, in the L2 norm.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded.fused.layer import fused_forward
from qsharded.fused.policy import Policy
from qsharded.models.attention_inputs import AttentionInputs, attention_inputs
from qsharded.models.config import ExpertMixture, ModelConfig, NormNames
from qsharded.models.decoder import DecoderLayer
from qsharded.models.rope import RopeConfig
from qsharded.nn import LoRAConfig, add_lora, quantize_

pytestmark = pytest.mark.gpu

ROWS, LENGTH, WIDTH = 2, 256, 256
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=WIDTH,
    intermediate_size=704,  # 11 blocks of 64 a row
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)
_AROUND = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
# a token gets all of them, so that no rounding makes it choose others
ALL_CHOSEN = ExpertMixture(experts=3, per_token=3, intermediate_size=192)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"layer_windows": (50,)},
    "phi3": {"fused_qkv": True, "mlp": "fused"},
    "gemma2": {
        "norms": _AROUND,
        "norm_offset": True,
        "activation": "gelu_tanh",
        "score_softcap": 2.0,
        "layer_windows": (50,),
    },
    "gemma3": {
        "norms": _AROUND,
        "norm_offset": True,
        "activation": "gelu_tanh",
        "qk_norm": True,
        "attention_scale": 0.1,
    },
    "glm4": {"rope_interleaved": True, "rope": RopeConfig(rotary_fraction=0.5)},
    "phi4-mini": {"rope": RopeConfig(rotary_fraction=0.75)},
    "granite": {"residual_multiplier": 0.22, "attention_scale": 0.05},
    "qwen3_moe": {"mixture": ALL_CHOSEN, "qk_norm": True},
    "glm4_moe": {
        "mixture": dataclasses.replace(ALL_CHOSEN, router="sigmoid", shared_size=256),
        "qkv_bias": True,
        "rope": RopeConfig(rotary_fraction=0.5),
    },
    "gpt_oss": {
        "mixture": dataclasses.replace(ALL_CHOSEN, router="softmax of chosen", clamped=True),
        "sinks": True,
        "qkv_bias": True,
        "o_bias": True,
        "layer_windows": (50,),
    },
}
# each row's documents by their lengths; the last one of the second row is padding
LENGTHS = ((100, 156), (130, 70, 56))
DOCUMENTS = torch.tensor([[0] * 100 + [1] * 156, [0] * 130 + [1] * 70 + [-1] * 56])
POSITIONS = torch.cat([torch.arange(length) for row in LENGTHS for length in row]).view(ROWS, LENGTH)
LORA = LoRAConfig(r=4, rank_pattern={"up_proj": 16}, alpha_pattern={"k_proj": 7.0}, strict=False)

Results = dict[str, Tensor]


def layer_of(config: ModelConfig, dtype: torch.dtype, adapters: torch.dtype) -> DecoderLayer:
    """The same weights in any ``dtype``: those of bf16, and adapters' that are exact in ``adapters``."""
    torch.manual_seed(0)
    layer = DecoderLayer(config, 0)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    quantize_(layer)
    layer.requires_grad_(False)
    add_lora(layer, LORA)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
        if parameter.dtype != torch.float32:  # packed bytes
            continue
        if "lora_" in name:
            kept = adapters if dtype == torch.bfloat16 else torch.float32
            parameter.data = parameter.data.to(adapters).to(kept)
        else:
            parameter.data = parameter.data.bfloat16().to(dtype)
    return layer.cuda()


def inputs_of(
    config: ModelConfig, dtype: torch.dtype, positions: Tensor, documents: Tensor | None = None
) -> AttentionInputs:
    documents = None if documents is None else documents.cuda()
    made = attention_inputs(config, positions.cuda(), dtype, documents_BT=documents)
    return made[0]


def random(seed: int, length: int = LENGTH) -> Tensor:
    """Exact in bf16, whatever it is cast to."""
    values = torch.randn(ROWS, length, WIDTH, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().cuda()


def results(layer: DecoderLayer, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Results:
    """The output and its gradients, by name, in fp32."""
    leaf = x.detach().clone().requires_grad_()
    output = forward(leaf)
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(output, [leaf, *trained.values()], grad)
    found = {"output": output.detach(), "x": grads[0], **dict(zip(trained, grads[1:], strict=True))}
    return {name: tensor.float() for name, tensor in found.items()}


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_as_near_as_the_composition(
    config: ModelConfig, adapters: torch.dtype, positions: Tensor, documents: Tensor | None
) -> None:
    length = positions.shape[1]
    x, grad = random(1, length), random(2, length)
    precise, layer = (layer_of(config, dtype, adapters) for dtype in (torch.float32, torch.bfloat16))
    of_fp32, of_bf16 = (inputs_of(config, p, positions, documents) for p in (torch.float32, torch.bfloat16))
    expected = results(precise, lambda x: precise(x, of_fp32), x.float(), grad.float())
    composed = results(layer, lambda x: layer(x, of_bf16), x, grad)
    fused = results(layer, lambda x: fused_forward(layer, x, of_bf16), x, grad)
    assert fused.keys() == expected.keys()
    for name, value in expected.items():
        assert error(fused[name], value) <= 1.5 * error(composed[name], value) + 2e-3, name


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_layer_is_as_near_to_fp32_as_the_composition(
    family: str, documents: Tensor | None, adapters: torch.dtype
) -> None:
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH) if documents is None else POSITIONS
    assert_as_near_as_the_composition(config, adapters, positions, documents)


def test_so_it_is_with_long_rows_which_another_kernel_attends_to() -> None:
    positions = torch.arange(1024).expand(ROWS, 1024)
    assert_as_near_as_the_composition(CONFIG, torch.float32, positions, None)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_again_is_what_was_computed(family: str, documents: Tensor | None) -> None:
    """But for the order in which attention's backward adds up."""
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    layer, inputs = (
        layer_of(config, torch.bfloat16, torch.float32),
        inputs_of(config, torch.bfloat16, POSITIONS, documents),
    )
    kept, again = (
        results(layer, lambda x, policy=policy: fused_forward(layer, x, inputs, policy), random(1), random(2))
        for policy in (Policy(), Policy(frozenset()))
    )
    for name, value in kept.items():
        assert error(again[name], value) <= 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    """Packed or each in a row of its own, they differ by roundings of some products to bf16, 0.4% at most each."""
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    layer, x, grad = layer_of(config, torch.bfloat16, torch.float32), random(1), random(2)
    grad[1, -LENGTHS[1][-1] :] = 0  # padding
    of_packed = inputs_of(config, torch.bfloat16, POSITIONS, DOCUMENTS)
    packed = results(layer, lambda x: fused_forward(layer, x, of_packed), x, grad)
    sums: Results = {}
    for row, start, stop in ((0, 0, 100), (0, 100, 256), (1, 0, 130), (1, 130, 200)):
        place = slice(row, row + 1), slice(start, stop)
        alone = inputs_of(config, torch.bfloat16, torch.arange(stop - start)[None])
        found = results(layer, lambda x, alone=alone: fused_forward(layer, x, alone), x[place], grad[place])
        for name in ("output", "x"):
            assert error(packed[name][place], found.pop(name)) < 1e-2, name
        sums = {name: value + sums.get(name, 0) for name, value in found.items()}
    for name, value in sums.items():
        assert error(packed[name], value) < 1e-2, name
    mixed = inputs_of(config, torch.bfloat16, POSITIONS)
    with torch.no_grad():
        output = fused_forward(layer, x, mixed).float()
    assert error(output[0, 100:], packed["output"][0, 100:]) > 2e-2, "documents that see each other go unnoticed"
