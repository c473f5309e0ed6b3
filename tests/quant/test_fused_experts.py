"""transformers' experts, packed: the bytes of each matrix alone, and what transformers computes of them."""

import importlib
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qsharded.quant import formats
from qsharded.quant.convert import quantize_
from qsharded.quant.experts import PackedExperts
from qsharded.quant.fused_experts import SplitExperts, is_known
from tests.models.parity import round_experts

E, D, J, M, k = 5, 64, 128, 12, 3
KNOWN = [
    "olmoe.Olmoe",
    "gpt_oss.GptOss",
    "glm5_next.Glm5NextText",
    "minimax_m3_vl.MiniMaxM3VL",
]  # two gates of their own
UNKNOWN = ["aria.Aria", "llama4.Llama4Text", "nemotron_h.NemotronH", "muse_spark.MuseSpark"]


def experts_of(family: str, **sizes: int) -> Any:
    """A class's own, of random weights; classes of transformers that is installed differ in what they are called."""
    module, name = family.split(".")
    modelling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    kind = getattr(modelling, f"{name}Experts")
    config = AutoConfig.for_model("olmoe", hidden_act="silu", **{"hidden_size": D, "intermediate_size": J, **sizes})
    for key in ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"):
        setattr(config, key, E)
    config.moe_intermediate_size, config.moe_latent_size, config.mlp_hidden_act = (
        config.intermediate_size,
        None,
        "relu2",
    )
    config.moe_hidden_size, config.post_norm_eps = D, 1e-6
    config.swiglu_limit, config.swiglu_alpha, config._experts_implementation = 0.5, 1.7, "eager"
    torch.manual_seed(0)
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


def model_of(family: str, **sizes: int) -> nn.Module:
    return nn.ModuleDict({"experts": experts_of(family, **sizes), "other": nn.Linear(64, 8)})


def computed(experts: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output, and the gradients by tokens and scores; two tokens have fewer experts than others."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(M, D, generator=generator).to(device, dtype).requires_grad_()
    scores = torch.rand(M, k, generator=generator).to(device).requires_grad_()
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(M)]).to(device)
    if "GptOss" not in type(experts).__name__ and not getattr(experts, "interleaved", False):
        chosen[3, 1:], chosen[7] = E, E  # "no expert"; gpt-oss has no such number
    out = experts(hidden, chosen, scores)
    out.backward(torch.randn(M, D, generator=generator).to(device, dtype))
    assert hidden.grad is not None
    assert scores.grad is not None
    made = {"out": out.detach(), "hidden": hidden.grad, "scores": scores.grad}
    return {name: value.float().cpu() for name, value in made.items()}


@pytest.mark.parametrize("family", KNOWN)
def test_packed_they_compute_what_transformers_does_of_the_decoded_weights(family: str) -> None:
    model = quantize_(model_of(family))
    assert isinstance(model["experts"], SplitExperts)
    theirs = experts_of(family)
    round_experts(theirs)
    found, expected = computed(model["experts"]), computed(theirs)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", KNOWN)
def test_on_a_gpu_they_compute_that_within_bf16(family: str) -> None:
    model = quantize_(model_of(family).cuda())
    on_cpu = quantize_(model_of(family))
    state = zip(model.state_dict().items(), on_cpu.state_dict().values(), strict=True)
    for (name, found), expected in state:
        assert found.cpu().flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8)), name
    expected, found = computed(on_cpu["experts"]), computed(model["experts"], "cuda", torch.bfloat16)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 0.03 * value.abs().max(), name  # bf16 has three digits


def matrices(theirs: Any) -> dict[str, Tensor]:
    """[E, N, K] of each projection, as transformers' own code takes them apart."""
    turned, joined = theirs.gate_up_proj, theirs.down_proj
    if theirs.is_transposed:
        gate_up, down = turned.transpose(1, 2), joined.transpose(1, 2)
        return {"gate_proj": gate_up[:, ::2], "up_proj": gate_up[:, 1::2], "down_proj": down}
    return {"gate_proj": turned[:, :J], "up_proj": turned[:, J:], "down_proj": joined}


@pytest.mark.parametrize("family", KNOWN[:2])
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_has_the_bytes_of_its_matrix_alone(family: str, double_quant: bool) -> None:
    experts: Any = quantize_(model_of(family), double_quant=double_quant)["experts"]
    for part, weight_ENK in matrices(experts_of(family)).items():
        for e, weight_NK in enumerate(weight_ENK):
            alone = formats.quantize(weight_NK.contiguous(), double_quant=double_quant)
            found = experts.get_submodule(part).packed().expert(e)
            assert found.codes.equal(alone.codes)
            assert found.decoded_absmax().equal(alone.absmax)
    theirs = experts_of(family)
    if theirs.has_bias:
        assert experts.gate_proj.bias.equal(theirs.gate_up_proj_bias[:, ::2])
        assert experts.up_proj.bias.equal(theirs.gate_up_proj_bias[:, 1::2])
        assert experts.down_proj.bias.equal(theirs.down_proj_bias)


@pytest.mark.parametrize("family", UNKNOWN)
def test_another_layout_keeps_its_tensors_and_is_told(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(family)
    theirs = model["experts"]
    before = {name: parameter.clone() for name, parameter in theirs.named_parameters()}
    with caplog.at_level(logging.WARNING, "qsharded"):
        quantize_(model)
    assert model["experts"] is theirs
    assert all(parameter.equal(before[name]) for name, parameter in theirs.named_parameters())
    matrices_left = [parameter for parameter in theirs.parameters() if parameter.dim() == 3]
    assert f"experts.down_proj ({theirs.down_proj.nbytes:,})" in caplog.text
    assert f"So {sum(p.nbytes for p in matrices_left):,} of the model's" in caplog.text


def test_rows_that_are_no_whole_blocks_leave_all_of_a_layers_experts(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("olmoe.Olmoe", intermediate_size=96)  # down's; gate's and up's are D
    assert is_known(model["experts"])
    quantize_(model)
    assert type(model["experts"]).__name__ == "OlmoeExperts"
    assert "experts.gate_up_proj" in caplog.text


def test_the_filter_chooses_all_projections_or_none() -> None:
    seen: list[str] = []

    def chosen(name: str, module: Any) -> bool:
        seen.append(name)
        return name != "experts.down_proj"

    assert type(quantize_(model_of("olmoe.Olmoe"), chosen)["experts"]).__name__ == "OlmoeExperts"
    assert seen == ["other", "experts.gate_proj", "experts.up_proj", "experts.down_proj"]
    with pytest.raises(ValueError, match=r"^no linear layer was quantized"):
        quantize_(model_of("olmoe.Olmoe"), lambda name, _: name == "experts.up_proj")


def test_one_that_is_not_finite_is_named() -> None:
    model = model_of("gpt_oss.GptOss")
    model["experts"].gate_up_proj[2, 7, 5] = torch.nan  # column 5 is up's
    with pytest.raises(ValueError, match=r"^experts\.up_proj\.weight\[2\] holds NaN"):
        quantize_(model)


def test_on_the_meta_device_they_come_empty() -> None:
    with torch.device("meta"):
        model = quantize_(model_of("gpt_oss.GptOss").to("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 3


class RouterLinear(nn.Linear):
    """As Phi-3.5-MoE's."""


@pytest.mark.parametrize("router", [nn.ModuleDict({"gate": nn.Linear(D, E)}), RouterLinear(D, E)], ids=["below", "own"])
def test_a_router_beside_them_stays_as_it_is(router: nn.Module) -> None:
    shared = nn.ModuleDict({"gate": nn.Linear(D, E), "up": nn.Linear(D, E)})  # E is its width
    model = nn.ModuleDict({"experts": experts_of("olmoe.Olmoe"), "router": router, "shared": shared})
    before = [type(module) for module in router.modules()]
    quantize_(model)
    assert [type(module) for module in router.modules()] == before
    assert isinstance(model["experts"], SplitExperts)
    assert not any(isinstance(module, nn.Linear) for module in shared.modules())
