"""Routers whose logits are in fp32, in a model of 16 bits, against transformers' own."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from qsharded.checkpoint import load_model
from qsharded.models import ModelConfig
from qsharded.models.routers import ROUTERS
from tests.models.parity import case
from tests.models.variants import VARIANTS

THEIRS = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2TopkRouter),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3TopkRouter),
}


@pytest.mark.parametrize("variant", THEIRS)
def test_in_bf16_experts_and_weights_are_transformers(variant: str) -> None:
    described, (config_class, router_class) = VARIANTS[variant], THEIRS[variant]
    shape = {key: value for key, value in described.items() if key not in ("architectures", "model_type")}
    theirs, mixture = router_class(config_class(**shape)), ModelConfig.from_hf(described).mixture
    assert mixture is not None
    torch.manual_seed(0)
    for tensor in theirs.state_dict().values():
        nn.init.normal_(tensor, std=0.1)
    values = theirs.state_dict()
    theirs.weight.data = theirs.weight.data.bfloat16()
    if "e_score_correction_bias" in values:  # which transformers leaves in fp32, and which may be large
        values["e_score_correction_bias"].add_(9.4)
    ours = ROUTERS[mixture.router](described["hidden_size"], mixture)
    ours.load_state_dict(values)
    ours.to(torch.bfloat16)
    x_MD = torch.randn(200, described["hidden_size"], dtype=torch.bfloat16)
    with torch.no_grad():
        logits_ME, scores_Mk, experts_Mk = theirs(x_MD)
        choice = ours(x_MD)
    torch.testing.assert_close(choice.logits_ME, logits_ME, rtol=1e-6, atol=1e-6)
    order, expected_order = choice.experts_Mk.sort(dim=1), experts_Mk.sort(dim=1)
    assert order.values.equal(expected_order.values)
    torch.testing.assert_close(
        choice.scores_Mk.gather(1, order.indices),
        scores_Mk.gather(1, expected_order.indices),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_model_in_bf16_has_the_correction_bias_as_it_is_stored() -> None:
    checkpoint = case("deepseek_v3").checkpoint
    model, name = load_model(checkpoint, device="cpu"), "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_file(checkpoint / "model.safetensors")[name]
    assert model.get_buffer(name).equal(stored)
    assert not stored.bfloat16().float().equal(stored)
    assert model.get_submodule("model.layers.1.mlp.gate").weight.dtype == torch.bfloat16
