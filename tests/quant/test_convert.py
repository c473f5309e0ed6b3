import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import qsharded
from qsharded.nn import PackedLinear, quantize_
from qsharded.quant import formats
from qsharded.quant.experts import PackedExperts
from tests.kernels.cases import assert_same_bits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)))


class Model(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.odd = nn.Linear(100, 64)
        self.lm_head = nn.Linear(64, 10, bias=False)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear | PackedLinear)}


BLOCK_LINEARS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


def test_every_linear_but_the_head_and_misfits_is_replaced_in_place() -> None:
    model = Model()
    assert quantize_(model) is model
    assert kinds(model) == dict.fromkeys(BLOCK_LINEARS, PackedLinear) | dict.fromkeys(["odd", "lm_head"], nn.Linear)
    assert isinstance(model.layers[0].norm, nn.LayerNorm)


@pytest.mark.parametrize("head", ["lm_head", "text.lm_head"])
def test_the_head_is_left_out_wherever_it_is(head: str) -> None:
    model = nn.ModuleDict({"text": nn.ModuleDict({"lm_head": nn.Linear(64, 8), "not_lm_head": nn.Linear(64, 8)})})
    model["lm_head"] = nn.Linear(64, 8)
    quantize_(model)
    assert kinds(model)[head] is nn.Linear
    assert kinds(model)["text.not_lm_head"] is PackedLinear


def test_a_layer_whose_width_does_not_fit_is_kept_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Model().bfloat16()
    before = model.odd.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "qsharded"):
        quantize_(model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    total = sum(parameter.nbytes for parameter in Model().bfloat16().parameters())
    assert record.getMessage() == (
        f"not quantized, in_features is no multiple of 64: odd. So {100 * 64 * 2:,} of the model's {total:,} bytes "
        "stay in 16 or 32 bits, beside embedding and head"
    )
    assert_same_bits(model.odd.weight.detach(), before)


EXPERTS = ["Qwen3Moe", "GptOss", "Mixtral", "DeepseekV3"]


def mixture(family: str, **sizes: int) -> Any:
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, **sizes}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "first_k_dense_replace": 0}
    experts = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{family}Config")(**shape, **heads, **experts, n_group=1, topk_group=1)
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_a_known_layout_are_packed_and_routers_stay(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = mixture(family)
    with caplog.at_level(logging.WARNING, "qsharded"):
        quantize_(model)
    assert not caplog.records
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedExperts)]
    parts = ("gate_proj", "up_proj", "down_proj")
    assert packed == [f"model.layers.{n}.mlp.experts.{part}" for n in range(2) for part in parts]


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3"])
def test_experts_that_stay_are_told_in_one_warning_with_their_bytes(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole block of 64 is not in their rows; the router beside them stays by design and is not told."""
    model = mixture(family, moe_intermediate_size=48)
    total = sum(parameter.nbytes for parameter in model.parameters())
    with caplog.at_level(logging.WARNING, "qsharded"):
        quantize_(model)
    (record,) = caplog.records
    left = [
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if ".mlp." in name and "experts." in name and parameter.dim() > 1
        if "shared_experts" not in name or "down_proj" in name
    ]
    assert f"So {sum(left):,} of the model's {total:,} bytes stay in 16 or 32 bits" in record.getMessage()
    assert "gate.weight" not in record.getMessage()
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        one = model.get_parameter(f"model.layers.0.mlp.{name}")
        assert f"model.layers.*.mlp.{name} ({2 * one.nbytes:,})" in record.getMessage()


def test_what_the_filter_leaves_out_is_no_misfit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "qsharded"):
        quantize_(Model(), lambda name, linear: "up" in name)
    assert not caplog.records


def test_the_filter_sees_each_linear_and_decides() -> None:
    model, seen = Model(), {}

    def chosen(name: str, linear: nn.Linear) -> bool:
        seen[name] = linear
        return name in ("layers.1.down", "lm_head")

    expected = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantize_(model, chosen)
    assert seen == expected
    assert {name for name, kind in kinds(model).items() if kind is PackedLinear} == {"layers.1.down", "lm_head"}


def test_a_quantized_model_computes_with_the_dequantized_weights() -> None:
    torch.manual_seed(0)
    model = Model().layers
    x = torch.randn(5, 64)
    plain = model[1](model[0](x))
    quantize_(model)
    quantized = model[1](model[0](x))
    assert not torch.equal(quantized, plain)
    dense = nn.ModuleList([Block(), Block()])
    for block, other in zip(dense, model, strict=True):
        block.norm, block.down.bias = other.norm, other.down.bias
        block.up.weight.data, block.down.weight.data = (m.dequantize(torch.float32) for m in (other.up, other.down))
    assert_same_bits(quantized.detach(), dense[1](dense[0](x)).detach())


@pytest.mark.parametrize(("quant_type", "block_size"), [("fp4", 64), ("nf4", 32), ("fp4", 4096)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_kind_computes_and_trains_with_the_dequantized_weights(
    quant_type: str, block_size: int, double_quant: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(block_size, 6)
    expected = formats.quantize(plain.weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    model = nn.Sequential(nn.Linear(3, block_size, bias=False), copy.deepcopy(plain))
    kind: Any = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    quantize_(model, lambda name, _: name == "1", **kind)
    plain.weight.data = expected.dequantize(torch.float32)
    outputs = [module(model[0](torch.ones(2, 3))) for module in (model[1], plain)]
    assert_same_bits(outputs[0].detach(), outputs[1].detach())
    gradients = [torch.autograd.grad(y.square().sum(), model[0].weight, retain_graph=True)[0] for y in outputs]
    assert_same_bits(*gradients)


def test_a_layer_of_no_whole_blocks_stays_and_a_kind_that_is_none_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with caplog.at_level(logging.WARNING, "qsharded"):
        quantize_(model, block_size=128)
    assert caplog.records[0].getMessage().startswith("not quantized, in_features is no multiple of 128: layers.0.up")
    with pytest.raises(ValueError, match=r"whose in_features is a multiple of 4096$"):
        quantize_(Model(), block_size=4096)
    for kind in ({"quant_type": "af4"}, {"block_size": 0}):
        with pytest.raises(ValueError, match="must be one of"):
            quantize_(Model(), **kind)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool) -> None:
    model = quantize_(Model().train(training))
    assert {m.training for m in model.modules()} == {training}


def test_on_the_meta_device_layers_come_empty() -> None:
    with torch.device("meta"):
        model = quantize_(Model())
    assert all(p.is_meta for p in model.parameters())
    assert [name for name, kind in kinds(model).items() if kind is PackedLinear] == BLOCK_LINEARS


def test_it_is_public() -> None:
    assert qsharded.quantize_ is quantize_


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (nn.Sequential(nn.Embedding(4, 64)), None),
        (nn.ModuleDict({"lm_head": nn.Linear(64, 8)}), None),
        (nn.Sequential(nn.Linear(100, 8)), None),
        (nn.Sequential(nn.Linear(64, 8)), lambda name, linear: False),
        (quantize_(nn.Sequential(nn.Linear(64, 8))), None),
    ],
    ids=["no linear", "a head alone", "a misfit alone", "a filter that takes none", "quantized already"],
)
def test_nothing_to_quantize_is_an_error(model: nn.Module, chosen: object) -> None:
    with pytest.raises(ValueError, match="no linear layer was quantized: the filter chose none"):
        quantize_(model, chosen)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = Model()
    model.layers[1].down.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"^layers\.1\.down\.weight holds NaN or infinity"):
        quantize_(model)


def test_adapters_are_not_quantized() -> None:
    model = qsharded.nn.add_lora(nn.Sequential(nn.Linear(64, 64)), qsharded.nn.LoRAConfig(r=64))
    try:
        quantize_(model)
    except ValueError:
        return
    assert isinstance(model[0].lora_A, nn.Linear)
    assert model[0].lora_A.weight.requires_grad


def test_a_linear_layer_itself_is_refused_with_what_packs_it() -> None:
    with pytest.raises(
        ValueError, match=r"this is a linear layer itself: qsharded\.nn\.PackedLinear\.from_linear\(layer\)"
    ):
        quantize_(nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_(np.ones((4, 64))), "model must be an nn.Module, got numpy.ndarray"),
        (lambda: quantize_(None), "model must be an nn.Module, got NoneType"),
        (
            lambda: qsharded.nf4.quantize(np.ones((4, 64))),
            "weight must be a torch.Tensor, got numpy.ndarray: torch.from_numpy(array)",
        ),
        (
            lambda: quantize_(nn.Linear),
            "model must be an nn.Module, got the class Linear itself: make one of it, Linear(...)",
        ),
        (lambda: quantize_(nn.Sequential(nn.Linear(64, 64)), filter="q_proj"), "filter must be a function"),
        (lambda: qsharded.nn.add_lora("m", qsharded.nn.LoRAConfig()), "model must be an nn.Module, got str"),
        (lambda: qsharded.nn.add_lora(nn.Sequential(), {"r": 8}), "config must be a LoRAConfig, got dict"),
        (lambda: qsharded.nn.LoRAConfig(r="8"), "a LoRA rank must be a whole number, got str"),
        (lambda: qsharded.nn.LoRAConfig(lora_alpha="8"), "lora_alpha must be a number, got str"),
        (lambda: qsharded.nn.LoRAConfig(lora_dropout="0.1"), "lora_dropout must be a number, got str"),
        (lambda: qsharded.optim.PagedAdamW8bit(nn.Linear(2, 2)), "params must be a model's parameters()"),
        (
            lambda: qsharded.optim.PagedAdamW8bit(nn.Linear(2, 2).parameters(), lr="1e-4"),
            "lr must be a number, got str",
        ),
        (lambda: qsharded.parallel.shard("m"), "model must be an nn.Module, got str"),
        (lambda: qsharded.parallel.shard(nn.Linear(2, 2)), "there are no ranks: call torch.distributed"),
        (lambda: qsharded.nf4.quantize([[1.0] * 64]), "weight must be a torch.Tensor, got list"),
        (
            lambda: qsharded.nn.PackedLinear.from_linear(np.ones((4, 64))),
            "linear must be an nn.Linear, got numpy.ndarray",
        ),
        (lambda: qsharded.load_model(None), "path_or_id must be a folder or a Hub id, got NoneType"),
        (lambda: qsharded.load_model("m", lora=16), "lora must be a LoRAConfig, got int"),
        (
            lambda: qsharded.load_model("m", dtype="bfloat16"),
            "dtype must be torch.bfloat16 or torch.float32, got 'bfloat16'",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
