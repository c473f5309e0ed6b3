"""The model without its adapters, for as long as a context lasts."""

import pytest
import torch
from torch import Tensor, nn

from qsharded.fused.layer import fused_forward
from qsharded.lora.disabled import adapters_disabled
from qsharded.lora.layer import lora_layers
from qsharded.models import CausalLM
from qsharded.nn import LoRAConfig, add_lora, quantize_
from tests.fused.test_layer import CONFIG, activations, inputs_of, layer_of

IDS = torch.arange(24).view(2, 12)


def model_of(lora: LoRAConfig | None = None) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(CONFIG, dtype=torch.float32)
    quantize_(model)
    model.requires_grad_(False)
    if lora is not None:
        add_lora(model, lora)
        for _, layer in lora_layers(model):
            for tensor in layer.updates().values():
                nn.init.normal_(tensor, 0.0, 0.1)
    return model


def test_a_forward_within_is_the_base_models_to_the_bit_and_without_gradient() -> None:
    expected: Tensor = model_of()(IDS)
    model = model_of(LoRAConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], lora_dropout=0.5))
    with adapters_disabled(model):
        found = model(IDS)
        with adapters_disabled(model):
            pass
        again = model(IDS)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert not found.requires_grad
    after = model(IDS)
    assert after.requires_grad
    assert not torch.allclose(after, expected)


def test_what_fails_within_leaves_the_adapters_on() -> None:
    model = model_of(LoRAConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert all(layer.enabled for _, layer in lora_layers(model))
    assert model(IDS).requires_grad


def test_the_fused_layer_has_no_adapters_either() -> None:
    x, inputs = activations(), inputs_of(CONFIG)
    expected = fused_forward(layer_of(CONFIG), x, inputs)
    adapted = layer_of(CONFIG, LoRAConfig(r=4))
    with adapters_disabled(adapted):
        assert torch.equal(fused_forward(adapted, x, inputs), expected)
    assert not torch.allclose(fused_forward(adapted, x, inputs), expected)


def test_a_module_trained_in_full_is_refused_by_name() -> None:
    model = model_of(LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"^lm_head\.weight is trained in full"), adapters_disabled(model):
        pass
