"""Adapters on embeddings, against their formula and against PEFT on the same weights."""

from typing import Any

import pytest
import torch
from torch import nn

from qsharded.lora.embedding import LoRAEmbedding
from qsharded.lora.layer import lora_layers
from qsharded.nn import LoRAConfig, add_lora
from tests.kernels.cases import assert_same_bits
from tests.lora.test_layer import llama, peft_layers, with_peft

V, D, R = 23, 8, 3


def embedding(dtype: torch.dtype = torch.float32, **settings: Any) -> LoRAEmbedding:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(V, D), "up": nn.Linear(D, D)}).to(dtype)
    layer = add_lora(model, LoRAConfig(**{"r": R, "target_modules": ["embed", "up"]} | settings))["embed"]
    assert isinstance(layer, LoRAEmbedding)
    return layer


def test_a_new_adapter_changes_nothing_and_can_learn() -> None:
    """A is zeros and B is not, as PEFT starts: with zeros in both no gradient would ever come."""
    layer, ids = embedding(), torch.arange(V).view(1, -1)
    assert_same_bits(layer(ids).detach(), layer.base_layer(ids).detach())
    layer(ids).square().sum().backward()
    assert layer.lora_embedding_A.grad.abs().max() > 0
    assert layer.lora_embedding_B.std().item() == pytest.approx(1, rel=0.5)  # 24 values


def test_start_depends_on_seed_and_name_alone() -> None:
    values = [embedding().initial(name, seed)[1] for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[3])


def test_it_adds_the_scaled_rows_of_its_product() -> None:
    layer, ids = embedding(lora_alpha=6), torch.tensor([[0, 5, 22], [5, 5, 1]])
    nn.init.normal_(layer.lora_embedding_A)
    A, B = layer.lora_embedding_A.double(), layer.lora_embedding_B.double()
    product = (B @ A * 2.0).T
    expected = layer.base_layer(ids).double() + product[ids]
    torch.testing.assert_close(layer(ids).double(), expected, rtol=1e-6, atol=1e-6)  # fp32 sums of 3 terms
    delta = layer.product(layer.lora_embedding_A, layer.lora_embedding_B)
    torch.testing.assert_close(delta.double(), product, rtol=1e-6, atol=1e-6)


def test_fp32_masters_give_bf16_activations() -> None:
    layer = embedding(torch.bfloat16)
    y = layer(torch.arange(V))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.dtype for p in layer.updates().values()} == {p.grad.dtype for p in layer.updates().values()}
    assert layer.lora_embedding_A.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "target_modules", [["q_proj", "embed_tokens"], ["model.embed_tokens"], r".*(embed_tokens|v_proj)"], ids=str
)
def test_chosen_are_those_that_peft_chooses_with_its_logits_and_gradients(target_modules: Any) -> None:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": target_modules, "rank_pattern": {"embed_tokens": 2}}
    ours, theirs = add_lora(llama(), LoRAConfig(**settings)), with_peft(**settings)
    own = dict(lora_layers(ours))
    assert own.keys() == {name for name, _ in peft_layers(theirs)}
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for name, layer in peft_layers(theirs):
        parts = {part: getattr(layer, part.split(".")[0])["default"] for part in own[name].updates()}
        pairs += [(own[name].updates()[part], getattr(p, "weight", p)) for part, p in parts.items()]
    with torch.no_grad():
        for mine, peft in pairs:
            assert mine.shape == peft.shape
            mine.copy_(peft.copy_(torch.randn(peft.shape, generator=generator)))
    ids = torch.arange(24).view(2, 12)
    logits = [model(ids).logits for model in (ours, theirs)]
    for said in logits:
        said.square().mean().backward()
    assert_same_bits(logits[0].detach(), logits[1].detach())
    for mine, peft in pairs:
        assert_same_bits(mine.grad, peft.grad)


def test_all_linear_leaves_the_embedding_alone() -> None:
    assert "model.embed_tokens" not in dict(lora_layers(add_lora(llama(), LoRAConfig())))


def test_a_tied_embedding_is_adapted_and_the_head_keeps_the_frozen_weight() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(V, D), "head": nn.Linear(D, V, bias=False)})
    model["head"].weight = model["embed"].weight
    add_lora(model, LoRAConfig(r=R, target_modules=["embed"]))
    assert model["head"].weight is model["embed"].base_layer.weight
    assert not model["head"].weight.requires_grad
