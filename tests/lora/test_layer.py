"""Adapters against their formula and against PEFT on the same weights.

Axes: N = out_features, K = in_features.
"""

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.lora.layer import lora_layers, reset_adapters
from qsharded.lora.low_rank import initial_A
from qsharded.nn import LoRAConfig, LoRALinear, PackedLinear, add_lora, quantize_
from tests.kernels.cases import assert_same_bits

N, K, R = 48, 192, 4


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(K, N), nn.Linear(N, K, bias=False)).to(dtype)


def packed() -> nn.Sequential:
    return quantize_(nn.Sequential(dense()[0]))


def adapted(model: nn.Module, **settings: Any) -> LoRALinear:
    """The first layer of ``model`` with an adapter that does something."""
    layer = add_lora(model, LoRAConfig(**({"r": R} | settings)))[0]
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_B.weight.copy_(activations(*layer.lora_B.weight.shape, seed=6) / 10)
    return layer


# --- the layer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [dense, packed])
def test_a_new_adapter_changes_no_bit(make: Any, dtype: torch.dtype) -> None:
    base, x = make().to(torch.bfloat16) if dtype == torch.bfloat16 else make(), activations(2, 5, K, dtype=dtype)
    expected = base[0](x)
    layer = add_lora(base, LoRAConfig(r=R))[0]
    assert isinstance(layer, LoRALinear)
    assert layer.lora_A.weight.abs().max() > 0
    assert_same_bits(layer(x).detach(), expected.detach())


@pytest.mark.parametrize("make", [dense, packed])
def test_the_adapter_adds_its_scaled_product(make: Any) -> None:
    layer, x = adapted(make(), lora_alpha=6), activations(2, 5, K)
    A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    update = x.double() @ A.t() @ B.t() * 1.5
    base = layer.base_layer(x).double()
    torch.testing.assert_close(layer(x).double(), base + update, rtol=1e-6, atol=1e-6)  # fp32 sums of 192 terms
    torch.testing.assert_close(layer.update(x).double(), update, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.delta_weight().double(), B @ A * 1.5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp32_masters_train_on_bf16_activations(dtype: torch.dtype) -> None:
    layer = adapted(packed().bfloat16(), dtype=dtype)
    x = activations(64, K, dtype=torch.bfloat16).requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    upstream = activations(*y.shape, dtype=torch.bfloat16)
    y.backward(upstream)
    assert x.grad.dtype == torch.bfloat16
    assert layer.lora_A.weight.grad.dtype == layer.lora_B.weight.grad.dtype == dtype
    exact = copy.deepcopy(layer.lora_A).double(), copy.deepcopy(layer.lora_B).double()
    (exact[1](exact[0](x.detach().double())) * layer.scaling).backward(upstream.double())
    for ours, theirs in zip((layer.lora_A, layer.lora_B), exact, strict=True):
        error = (ours.weight.grad.double() - theirs.weight.grad).norm() / theirs.weight.grad.norm()
        assert error < 2**-7  # some roundings to bf16 of 2**-9 each, at random


def test_dropout_is_on_the_adapters_input_and_in_training_only() -> None:
    layer, x = adapted(dense(), lora_dropout=0.5), activations(3, K)
    layer.eval()
    quiet = layer(x)
    assert_same_bits(quiet.detach(), (layer.base_layer(x) + layer.update(x)).detach())
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    kept = F.dropout(x, 0.5)
    assert 0 < (kept == 0).double().mean() < 1
    layer.eval()
    assert_same_bits(dropped.detach(), (layer.base_layer(x) + layer.update(kept)).detach())


class DoRALinear(LoRALinear):
    """Liu et al., arXiv:2402.09353: the adapted weight's rows, each scaled to the norm of the frozen weight's row."""

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        frozen, bias = self.base_layer.weight, self.base_layer.bias
        scale_N = frozen.norm(dim=1) / (frozen + self.delta_weight()).norm(dim=1)
        return scale_N * (base_output - bias + self.update(x)) + bias


def test_a_subclass_scales_the_bases_output_without_another_product() -> None:
    layer, x = adapted(dense()), activations(3, K)
    layer.__class__ = DoRALinear
    products = []
    layer.base_layer.register_forward_hook(lambda *_: products.append(1))
    weight = (layer.base_layer.weight + layer.delta_weight()).double()
    row_norms = layer.base_layer.weight.double().norm(dim=1)
    expected = x.double() @ (weight * (row_norms / weight.norm(dim=1))[:, None]).t() + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 1


def test_no_dropout_draws_no_random_number() -> None:
    layer, x = adapted(dense()).train(), activations(3, K)
    before = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool) -> None:
    """An adapter put into a model in eval mode must not drop anything."""
    model = add_lora(dense().train(training), LoRAConfig(r=R, lora_dropout=0.5))
    assert {m.training for m in model.modules()} == {training}


def test_it_compiles_whole_and_gives_the_same() -> None:
    layer = adapted(packed())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        x = activations(3, K, dtype=torch.bfloat16).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad])
    for eager, traced in zip(*results, strict=True):
        assert_same_bits(traced, eager)


def test_compiled_dropout_drops_the_same_forward_and_backward() -> None:
    """Compiled code draws other numbers than eager does; what it dropped is where x has no gradient."""
    layer, x = adapted(packed(), lora_dropout=0.3), activations(30, K).requires_grad_()
    y = torch.compile(layer.update, fullgraph=True, backend="aot_eager")(x)
    y.backward(activations(30, N))
    kept = x.grad != 0
    assert 0.6 < kept.double().mean() < 0.8
    expected = layer.eval().update(torch.where(kept, x / 0.7, 0))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # 1 / 0.7 is rounded in one place or the other


# --- initial values ---


def test_initial_values_are_spread_over_their_whole_range() -> None:
    A = initial_A("model.layers.0.q_proj", 0, 64, 400)
    bound = 1 / math.sqrt(400)
    assert A.dtype == torch.float32
    assert A.abs().max() <= bound
    assert A.max() > 0.99 * bound
    assert A.min() < -0.99 * bound
    assert abs(A.mean()) < 4 * bound / math.sqrt(3 * A.numel())  # four standard errors
    torch.testing.assert_close(A.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    A = initial_A("a", 0, R, K)
    torch.manual_seed(99)
    assert_same_bits(initial_A("a", 0, R, K), A)
    assert not torch.equal(initial_A("b", 0, R, K), A)
    assert not torch.equal(initial_A("a", 1, R, K), A)


def test_initial_values_do_not_disturb_the_global_generator() -> None:
    before = torch.get_rng_state()
    initial_A("a", 0, R, K)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layers_values_do_not_depend_on_which_others_are_adapted() -> None:
    both, second = (add_lora(dense(), LoRAConfig(r=R, target_modules=t)) for t in (["0", "1"], ["1"]))
    assert_same_bits(both[1].lora_A.weight.detach(), second[1].lora_A.weight.detach())
    assert_same_bits(second[1].lora_A.weight.detach(), initial_A("1", 0, R, N))


def test_reset_starts_over() -> None:
    layer = adapted(model := dense())
    reset_adapters(model, seed=7)
    assert_same_bits(layer.lora_A.weight.detach(), initial_A("0", 7, R, K))
    assert (layer.lora_B.weight == 0).all()


# --- which layers, of which rank and scaling: as PEFT chooses ---


@functools.cache
def llama_template() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=11,  # so that there is a layer 1 and a layer 10
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        )


def llama() -> nn.Module:
    return copy.deepcopy(llama_template())


def with_peft(**settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **settings))


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def ranks_and_scalings(**settings: Any) -> tuple[dict[str, tuple[int, float]], dict[str, tuple[int, float]]]:
    """Ours and PEFT's, by the layers' names."""
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    ours = add_lora(llama(), LoRAConfig(strict=False, **settings))  # PEFT takes patterns that match nothing
    return (
        {name: (layer.lora_A.weight.shape[0], layer.scaling) for name, layer in lora_layers(ours)},
        {name: (m.r["default"], m.scaling["default"]) for name, m in peft_layers(with_peft(**settings))},
    )


TARGETS: list[str | list[str]] = [
    "all-linear",
    ["q_proj", "v_proj"],
    ["self_attn.o_proj", "lm_head"],
    ["layers.1.self_attn.q_proj"],
    ["model.layers.0.mlp.down_proj"],
    r".*\.layers\.(0|1)\.(self_attn|mlp)\.(q|up)_proj",
    r"model\.layers\.\d\d\..*proj",
    r".*lm_head",
]


@pytest.mark.parametrize("target_modules", TARGETS, ids=str)
def test_targets_are_those_of_peft(target_modules: str | list[str]) -> None:
    ours, theirs = ranks_and_scalings(target_modules=target_modules)
    assert ours
    assert ours == theirs


@pytest.mark.parametrize(
    "target_modules",
    [["proj"], ["_proj"], "q_proj", ["layers.1"], ["Q_PROJ"], r"layers\.0\..*", r"model\.layers", []],
    ids=str,
)
def test_targets_that_match_nothing_are_an_error(target_modules: str | list[str]) -> None:
    with pytest.raises(ValueError, match="no linear layer matches target_modules = ") as raised:
        add_lora(llama(), LoRAConfig(target_modules=target_modules))
    assert repr(target_modules) in str(raised.value)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [
        ({}, {}),
        ({"q_proj": 2}, {"q_proj": 7}),
        ({"q_proj": 2}, {"up_proj|q_proj": 3}),
        ({"layers.1.self_attn.q_proj": 2}, {"layers.1.mlp.up_proj": 5}),
        ({r"layers\.\d+\.mlp\..*": 3}, {r"^model\.layers\.0\..*": 5}),
        ({"^q_proj": 2, "^model.layers.3.mlp.up_proj": 4}, {}),
        ({".*q_proj": 9, "q_proj": 2}, {"proj": 3}),
        ({"1.self_attn.q_proj": 2}, {"self_attn": 3}),
    ],
    ids=str,
)
def test_ranks_and_scalings_are_those_of_peft(
    rank_pattern: dict[str, int], alpha_pattern: dict[str, float], use_rslora: bool
) -> None:
    ours, theirs = ranks_and_scalings(rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, use_rslora=use_rslora)
    assert ours == theirs


def test_a_pattern_is_a_whole_name_or_its_ending_and_the_first_that_matches_counts() -> None:
    config = LoRAConfig(r=8, rank_pattern={r"0\.q": 1, "q": 2, ".*q": 3, r"a\..": 4}, alpha_pattern={"v": 5})
    names = ["x.0.q", "0.q", "x.1.q", "q", "xq", "x.a.b", "xa.b", "x.qq.k"]
    assert [config.rank(name) for name in names] == [1, 1, 2, 2, 3, 4, 8, 8]
    assert [config.scaling(name) for name in ("x.v", "xv", "x.0.q")] == [5 / 8, 4, 32]


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "scaling"), [(4, 6, False, 1.5), (16, 32, True, 8.0), (3, 1, True, 1 / math.sqrt(3))]
)
def test_scaling_by_its_formula(r: int, alpha: float, rslora: bool, scaling: float) -> None:
    assert LoRAConfig(r=r, lora_alpha=alpha, use_rslora=rslora).scaling("x") == scaling


@pytest.mark.parametrize(
    "modules_to_save",
    [["lm_head"], ["embed_tokens", "lm_head"], ["q_proj"], ["model.norm"], ["mlp"], ["layers.1.self_attn.q_proj"]],
    ids=str,
)
def test_what_trains_is_what_trains_with_peft(modules_to_save: list[str]) -> None:
    settings = {"r": R, "target_modules": "all-linear", "modules_to_save": modules_to_save}
    ours = add_lora(llama(), LoRAConfig(**settings))
    names = (name for name, p in with_peft(**settings).named_parameters() if p.requires_grad)
    theirs = {
        name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "") for name in names
    }
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == theirs


def test_logits_and_gradients_are_those_of_peft_on_the_same_weights() -> None:
    settings = {
        "r": 8,
        "lora_alpha": 12,
        "lora_dropout": 0.2,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 5},
    }
    ours, theirs = add_lora(llama(), LoRAConfig(**settings)), with_peft(**settings)
    own = dict(lora_layers(ours))
    with torch.no_grad():
        for name, layer in peft_layers(theirs):
            own[name].lora_B.weight.copy_(activations(*own[name].lora_B.weight.shape))
            layer.lora_A["default"].weight.copy_(own[name].lora_A.weight)
            layer.lora_B["default"].weight.copy_(own[name].lora_B.weight)
    ids = torch.arange(24).view(2, 12)
    for training in (False, True):
        logits = []
        for model in (ours.train(training), theirs.train(training)):
            model.zero_grad()
            torch.manual_seed(0)  # the same inputs are dropped
            logits.append(model(ids).logits)
            logits[-1].square().mean().backward()
        assert_same_bits(logits[0].detach(), logits[1].detach())
        for name, layer in peft_layers(theirs):
            assert_same_bits(own[name].lora_A.weight.grad, layer.lora_A["default"].weight.grad)
            assert_same_bits(own[name].lora_B.weight.grad, layer.lora_B["default"].weight.grad)
    for name, layer in peft_layers(theirs):
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(own[name].delta_weight(), expected, rtol=1e-6, atol=1e-6)  # r terms in fp32


# --- the model around them ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_alone_train_and_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    model = add_lora(packed(), LoRAConfig(r=R, dtype=dtype))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"0.lora_A.weight", "0.lora_B.weight"}
    assert {p.dtype for p in trained.values()} == {dtype}
    assert [tuple(p.shape) for p in trained.values()] == [(R, K), (N, R)]


def test_the_base_layer_is_the_layer_itself() -> None:
    model = packed()
    base = model[0]
    assert add_lora(model, LoRAConfig(r=R)) is model
    assert isinstance(base, PackedLinear)
    assert model[0].base_layer is base


def test_on_the_meta_device_nothing_is_filled() -> None:
    with torch.device("meta"):
        model = add_lora(quantize_(nn.Sequential(nn.Linear(K, N))), LoRAConfig(r=R))
    assert all(t.is_meta for t in model.state_dict().values())


def test_modules_to_save_train_in_full_without_an_adapter() -> None:
    model = add_lora(dense(torch.bfloat16), LoRAConfig(r=R, modules_to_save=["1"]))
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained == dict.fromkeys(["0.lora_A.weight", "0.lora_B.weight", "1.weight"], torch.float32)
    assert model[0].base_layer.weight.dtype == torch.bfloat16


def test_a_linear_trained_in_full_keeps_fp32_masters_under_bf16_activations() -> None:
    plain = dense()[0]
    model = nn.ModuleDict({"saved": copy.deepcopy(plain).bfloat16(), "up": nn.Linear(K, N)})
    saved = add_lora(model, LoRAConfig(r=R, modules_to_save=["saved"]))["saved"]
    x, upstream = activations(32, K, dtype=torch.bfloat16), activations(32, N, dtype=torch.bfloat16)
    expected = F.linear(x, plain.weight.bfloat16(), plain.bias.bfloat16())
    y = saved(x)
    assert_same_bits(y.detach(), expected.detach())
    y.backward(upstream)
    for gradient, exact in (
        (saved.weight.grad, upstream.double().t() @ x.double()),
        (saved.bias.grad, upstream.sum(0)),
    ):
        assert gradient.dtype == torch.float32
        assert (gradient.double() - exact).norm() / exact.double().norm() < 2**-8  # rounded to bf16 once


def test_linears_inside_a_module_trained_in_full_do_so_too() -> None:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N)), "up": nn.Linear(K, N)}).bfloat16()
    names = set(model.state_dict())
    saved = add_lora(model, LoRAConfig(r=R, modules_to_save=["mlp", "mlp.0"]))["mlp"]
    assert {name for name in model.state_dict() if name.startswith("mlp")} == {n for n in names if n.startswith("mlp")}
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in saved.parameters())
    assert saved[0](activations(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("ending", ["embed", "head"])
def test_a_tied_module_to_save_is_an_error_that_names_both_and_changes_nothing(ending: str) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 16), "head": nn.Linear(16, 8, bias=False), "up": nn.Linear(16, 16)})
    model["head"].weight = model["embed"].weight
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are one tied weight, which modules_to_save"):
        add_lora(model, LoRAConfig(r=R, target_modules=["up"], modules_to_save=[ending]))
    assert snapshot(model) == before


def test_a_tied_target_is_adapted_and_the_other_keeps_the_frozen_weight() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 16), "head": nn.Linear(16, 8, bias=False), "up": nn.Linear(16, 16)})
    model["head"].weight = model["embed"].weight
    frozen, ids = model["embed"].weight.detach().clone(), torch.arange(8)
    add_lora(model, LoRAConfig(r=R, target_modules=["up", "head"]))
    head = model["head"]
    assert isinstance(head, LoRALinear)
    nn.init.normal_(head.lora_B.weight)
    assert head.base_layer.weight is model["embed"].weight
    assert not model["embed"].weight.requires_grad
    assert torch.equal(model["embed"](ids), frozen)
    x = torch.randn(3, 16)
    torch.testing.assert_close(head(x), F.linear(x, frozen + head.delta_weight()))


def test_a_tie_among_others_is_no_hindrance() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 16), "head": nn.Linear(16, 8, bias=False), "up": nn.Linear(16, 16)})
    model["head"].weight = model["embed"].weight
    model["norm"] = nn.LayerNorm(16)
    add_lora(model, LoRAConfig(r=R, target_modules=["up"], modules_to_save=["norm"]))
    assert model["head"].weight is model["embed"].weight
    assert not model["head"].weight.requires_grad


def test_kept_out_of_quantization_are_modules_to_save_and_their_parts() -> None:
    config = LoRAConfig(modules_to_save=["mlp", "model.norm", "layers.1.self_attn"])
    saved = ["model.layers.0.mlp", "model.layers.0.mlp.up_proj", "mlp", "model.norm", "model.layers.1.self_attn.q_proj"]
    others = ["model.layers.0.mlp_x.up_proj", "model.layers.0.norm", "model.layers.11.self_attn.q_proj", "my_mlp", ""]
    assert [name for name in saved + others if config.is_saved(name)] == saved


# --- errors ---


def snapshot(model: nn.Module) -> dict[str, tuple[type, bool]]:
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return {name: (type(m), trains.get(f"{name}.weight", False)) for name, m in model.named_modules()}


def test_an_unknown_module_to_save_is_an_error_and_changes_nothing() -> None:
    model = dense()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no module's name ends with 'lm_haed' \(modules_to_save\)"):
        add_lora(model, LoRAConfig(modules_to_save=["1", "lm_haed"]))
    assert snapshot(model) == before


def test_a_quantized_module_to_save_is_an_error_and_changes_nothing() -> None:
    model = quantize_(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(64, 8)), "up": nn.Linear(64, 8)}))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="mlp is quantized and cannot be trained in full; leave it out of quantization"
    ):
        add_lora(model, LoRAConfig(modules_to_save=["mlp"]))
    assert snapshot(model) == before


def test_a_second_set_of_adapters_is_an_error() -> None:
    model = add_lora(dense(), LoRAConfig(r=R))
    with pytest.raises(ValueError, match="the model has adapters already"):
        add_lora(model, LoRAConfig(r=R))


@pytest.mark.parametrize(
    "settings",
    [{"r": 0}, {"r": -3}, {"rank_pattern": {"q_proj": 0}}, {"r": 4, "rank_pattern": {"a": 2, "b": -1}}],
    ids=str,
)
def test_ranks_below_1_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a LoRA rank must be at least 1, got (0|-3|-1)$"):
        LoRAConfig(**settings)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_dropout_must_leave_something(p: float) -> None:
    with pytest.raises(ValueError, match=rf"lora_dropout must be in \[0, 1\), got {p}"):
        LoRAConfig(lora_dropout=p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8], ids=str)
def test_adapters_are_fp32_or_bf16(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"adapters are float32 or bfloat16, got {dtype}"):
        LoRAConfig(dtype=dtype)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_layer_is_refused_by_name(option: str) -> None:
    """k_proj is there, but is not adapted."""
    config = LoRAConfig(target_modules=["q_proj", "up_proj"], **{option: {"q_proj": 2, "k_proj": 4}})
    with pytest.raises(ValueError, match=rf"{option}: 'k_proj' matches no adapted layer; adapted are q_proj, up_proj$"):
        add_lora(llama(), config)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_a_misspelt_name_among_right_ones_is_refused_with_the_names_that_exist(option: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"'w_proj'.*\({option}\)|{option} = \['w_proj'\]") as raised:
        add_lora(model, LoRAConfig(**{"target_modules": ["v_proj"], option: ["q_proj", "w_proj"]}))
    for name in ("q_proj", "down_proj", "embed_tokens"):
        assert name in str(raised.value).partition("there are")[2]
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "target_modules", [["q_proj", "mlp"], r".*self_attn.*", ["norm", "q_proj"], r".*\.\d"], ids=str
)
def test_targets_that_no_adapter_fits_are_refused_as_by_peft(target_modules: Any) -> None:
    with pytest.raises(ValueError, match="not supported"):
        with_peft(target_modules=target_modules)
    with pytest.raises(ValueError, match=r"target_modules = .*(mlp|self_attn|norm|layers\.0|\\d)"):
        add_lora(llama(), LoRAConfig(target_modules=target_modules))


def test_a_target_that_is_trained_in_full_is_no_misspelling() -> None:
    model = add_lora(llama(), LoRAConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]))
    assert {name.rpartition(".")[2] for name, _ in lora_layers(model)} == {"q_proj"}
