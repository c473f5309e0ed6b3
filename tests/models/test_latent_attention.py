"""Latent attention beside what tests of all families ask of it: its cache, and the kernels it goes through.

Axes: B rows, S queries, T keys, H heads, E and V dims of a head of q and k, and of v.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded.models import ModelConfig, attention
from qsharded.models.attention import SdpaAttention
from qsharded.models.attention_inputs import AttentionInputs, attention_inputs
from qsharded.models.kv_cache import KVCache
from qsharded.models.latent_attention import LatentAttention
from qsharded.nn import LoRAConfig, add_lora
from qsharded.utils.documents import Boundaries
from tests.models.variants import VARIANTS

B, LENGTH, FEW = 2, 90, 6
NARROW_VALUES, WIDE_VALUES = "deepseek_v3", "deepseek_v3-moonlight-v4"


def config_of(variant: str) -> ModelConfig:
    return ModelConfig.from_hf(VARIANTS[variant])


def layer_of(config: ModelConfig, dtype: torch.dtype = torch.float64, device: str = "cpu") -> LatentAttention:
    """With an adapter on what unpacks keys and values."""
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"attention": LatentAttention(config, 0)})
    add_lora(layer, LoRAConfig(r=4, target_modules=["kv_b_proj"]))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return layer["attention"].to(device, dtype).eval()


def hidden(config: ModelConfig, length: int = LENGTH) -> Tensor:
    return torch.randn(B, length, config.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BST: Tensor | None) -> Tensor:
    """[B, S, H, V]."""
    S, T = q.shape[1], k.shape[1]
    seen = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S) if mask_BST is None else mask_BST
    scores = torch.einsum("bshe,bthe->bhst", q, k) * scale
    return torch.einsum("bhst,bthv->bshv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class _Widths:
    """Stands in for FlashAttention, whose kernel takes heads of one width alone; here on any device."""

    def __init__(self) -> None:
        self.met: list[int] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, tuple[()]]:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        self.met.append(v.shape[-1])
        return SdpaAttention().forward(q, k, v, self._masked(inputs))[0], ()

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Any, inputs: Any) -> Any:
        return SdpaAttention().backward(grad, q, k, v, out, saved, self._masked(inputs))

    def _masked(self, inputs: AttentionInputs) -> AttentionInputs:
        assert inputs.boundaries is not None
        place = torch.arange(B * LENGTH, device=inputs.boundaries.starts.device)
        documents_BS = torch.searchsorted(inputs.boundaries.starts, place, right=True).view(B, LENGTH)
        seen = (documents_BS[:, :, None] == documents_BS[:, None]) & torch.ones(LENGTH, LENGTH).tril().bool()
        return dataclasses.replace(inputs, boundaries=None, mask_BST=seen[:, None])


@pytest.mark.parametrize("variant", [NARROW_VALUES, WIDE_VALUES])
def test_kernels_get_heads_of_one_width_and_give_what_the_definition_does(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With documents, as a GPU's kernel takes them; forward and gradients."""
    config, fake = config_of(variant), _Widths()
    monkeypatch.setattr(attention, "FlashAttention", lambda: fake)
    layer, x = layer_of(config), hidden(config).requires_grad_()
    documents = (torch.arange(LENGTH) >= LENGTH // 3).long().expand(B, -1)
    (by_mask, *_) = attention_inputs(config, torch.arange(LENGTH).expand(B, -1), x.dtype, documents_BT=documents)
    by_kernel = dataclasses.replace(by_mask, mask_BST=None, boundaries=Boundaries.of(documents))
    out = layer(x, by_kernel, None)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    monkeypatch.setattr("qsharded.models.latent_attention._attend_in_one_width", _plain)
    expected = layer(x, by_mask, None)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])
    assert fake.met == [config.kernel_head_dim]
    assert config.latent is not None
    assert config.latent.value_dim != config.head_dim


def _plain(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    assert inputs.scale is not None
    return by_definition(q, k, v, inputs.scale, inputs.mask_BST)


def step_by_step(layer: LatentAttention, config: ModelConfig, x: Tensor, documents: Tensor | None) -> Tensor:
    """All but the last tokens at once, and then each alone."""
    cache, made = KVCache(1, LENGTH), []
    for start, stop in [(0, LENGTH - FEW), *((n, n + 1) for n in range(LENGTH - FEW, LENGTH))]:
        positions = torch.arange(start, stop).expand(B, -1)
        known = None if documents is None else documents[:, :stop]
        (inputs, *_) = attention_inputs(config, positions, x.dtype, documents_BT=known, keys=stop)
        cache.reserve(stop - start, None)
        made.append(layer(x[:, start:stop], inputs, cache))
        cache.advance(stop - start)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("variant", [NARROW_VALUES, WIDE_VALUES])
@pytest.mark.parametrize("gaps", [False, True])
def test_one_token_attends_to_the_latent_vectors_and_gets_what_it_would_of_keys(
    variant: str, gaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter on the projection between them. Rows may begin with padding."""
    config = config_of(variant)
    layer, x, taken = layer_of(config), hidden(config), []
    documents = torch.where(torch.arange(LENGTH) < torch.tensor([[0], [7]]), -1, 0) if gaps else None
    to_latents = LatentAttention._attend_to_latents
    monkeypatch.setattr(LatentAttention, "_attend_to_latents", lambda *args: taken.append(args) or to_latents(*args))
    (inputs, *_) = attention_inputs(config, torch.arange(LENGTH).expand(B, -1), x.dtype, documents_BT=documents)
    with torch.no_grad():
        together = layer(x, inputs, None)
        alone = step_by_step(layer, config, x, documents)
    assert len(taken) == FEW
    torch.testing.assert_close(alone, together)


def test_a_cache_holds_a_latent_vector_and_one_key_a_token() -> None:
    config = config_of(NARROW_VALUES)
    layer, cache = layer_of(config), KVCache(1, LENGTH)
    (inputs, *_) = attention_inputs(config, torch.arange(FEW).expand(B, -1), torch.float64)
    layer(hidden(config, FEW), inputs, cache)
    held = [room.shape for room in (*cache._keys, *cache._values) if room is not None]
    assert config.latent is not None
    assert held == [(B, 1, LENGTH, config.latent.kv_rank), (B, 1, LENGTH, config.latent.rope_dim)]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [NARROW_VALUES, WIDE_VALUES])
def test_packed_documents_on_a_gpu(variant: str) -> None:
    """FlashAttention in bf16 against the CPU in fp64, forward and gradient."""
    config, made = config_of(variant), []
    documents = (torch.arange(LENGTH) >= LENGTH // 3).long().expand(B, -1)
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        layer, x = layer_of(config, dtype, device), hidden(config).to(device, dtype).requires_grad_()
        positions = torch.arange(LENGTH, device=device).expand(B, -1)
        (inputs, *_) = attention_inputs(config, positions, dtype, documents_BT=documents.to(device))
        assert (inputs.boundaries is None) == (device == "cpu")
        out = layer(x, inputs, None)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        made.append((out.double().cpu(), grad.double().cpu()))
    for right, found in zip(*made, strict=True):
        assert (found - right).norm() <= 0.05 * right.norm()
