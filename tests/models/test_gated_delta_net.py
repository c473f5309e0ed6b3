"""The chunked delta rule and the convolution against their definitions, token by token and document by document."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.models import gated_delta_net
from qsharded.models.attention_inputs import attention_inputs
from qsharded.models.config import ModelConfig
from qsharded.models.gated_delta_net import Documents, GatedDeltaNet, causal_conv, gated_delta_rule
from qsharded.models.layer_shapes import LinearAttention
from qsharded.utils.documents import Boundaries

B, S, G, H, KEY, VALUE, TAPS, CHANNELS = 2, 23, 2, 4, 6, 5, 4, 7
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14, [-1] * 3 + [0] * 1 + [1] * 4 + [2] * 15])
TOLERANCE = 1e-12  # fp64 in another order


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def tensors() -> list[Tensor]:
    q, k, v = random(B, S, G, KEY), random(B, S, G, KEY, seed=1), random(B, S, H, VALUE, seed=2)
    return [q, k, v, random(B, S, H, seed=3), random(B, S, H, seed=4)]


def rule(tensors: list[Tensor], documents: Documents, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, kept, beta = tensors
    return gated_delta_rule(q, k, v, -F.softplus(kept), beta.sigmoid(), documents, state)


def by_definition(tensors: list[Tensor], documents: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, kept, beta = tensors
    q, k = (F.normalize(t, dim=-1, eps=0).repeat_interleave(H // G, dim=2) for t in (q, k))
    state, out = torch.zeros(B, H, KEY, VALUE, dtype=torch.float64), []
    for t in range(S):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        state = state * torch.exp(-F.softplus(kept[:, t]))[..., None, None]
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].sigmoid()[..., None] * (v[:, t] - read))
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * KEY**-0.5)
    return torch.stack(out, dim=1), state


@pytest.mark.parametrize("ids", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_compute_what_tokens_in_turn_do(chunk: int, ids: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta_net, "_CHUNK", chunk)
    monkeypatch.setattr(gated_delta_net, "_unit", lambda x: F.normalize(x, dim=-1, eps=0))
    given = tensors()
    found, expected = rule(given, Documents.of(ids, S)), by_definition(given, ids)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() <= TOLERANCE
    grad = random(B, S, H, VALUE, seed=5).detach()
    gradients = (torch.autograd.grad(out, given, grad) for out, _ in (found, expected))
    for got, want in zip(*gradients, strict=True):
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("ids", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("first", [1, 2, 11])
def test_a_state_goes_on_where_it_was_left(first: int, ids: Tensor | None) -> None:
    given, (whole, last) = tensors(), rule(tensors(), Documents.of(ids, S))
    known = None if ids is None else ids[:, :first]
    begun, state = rule([t[:, :first] for t in given], Documents.of(known, first))
    rest, state = rule([t[:, first:] for t in given], Documents.of(ids, S - first), state)
    assert (torch.cat((begun, rest), dim=1) - whole).abs().max() <= TOLERANCE
    assert (state - last).abs().max() <= TOLERANCE


@pytest.mark.parametrize("ids", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("first", [1, 2, 11, S])
def test_a_convolution_sees_its_document_alone(first: int, ids: Tensor | None) -> None:
    x, weight = random(B, S, CHANNELS), random(CHANNELS, 1, TAPS, seed=1)
    expected = torch.zeros(B, S, CHANNELS, dtype=torch.float64)
    for row in range(B):
        for t in range(S):
            for lag in range(min(TAPS, t + 1)):
                if ids is None or ids[row, t] == ids[row, t - lag]:
                    expected[row, t] += x[row, t - lag] * weight[:, 0, TAPS - 1 - lag]
    known = None if ids is None else ids[:, :first]
    begun, before = causal_conv(x[:, :first], weight, Documents.of(known, first))
    rest, _ = causal_conv(x[:, first:], weight, Documents.of(ids, S - first), before)
    assert (torch.cat((begun, rest), dim=1) - expected).abs().max() <= TOLERANCE


def test_flash_linear_attention_gets_documents_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function as it is called, in place of the kernel, which needs a GPU."""
    config = ModelConfig(
        61, 24, 32, 1, 2, 1, 12, 64, linear=LinearAttention(G, H, KEY, VALUE, TAPS), linear_layers=(True,)
    )
    torch.manual_seed(0)
    layer = GatedDeltaNet(config, 0).double()
    positions = torch.arange(S).expand(B, S)
    (plain,) = attention_inputs(config, positions, torch.float64, documents_BT=DOCUMENTS)
    x, calls = random(B, S, 24), []

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, use_qk_l2norm_in_kernel: bool, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        assert use_qk_l2norm_in_kernel
        assert q.shape[:3] == v.shape[:3] == g.shape == beta.shape == (1, B * S, H)
        calls.append(cu_seqlens.tolist())
        ids = torch.bucketize(torch.arange(B * S), cu_seqlens, right=True)[None]
        return gated_delta_rule(q, k, v, g, beta, Documents.of(ids, B * S))[0], None

    expected = layer(x, plain, None)
    monkeypatch.setattr(gated_delta_net, "fla_rule", lambda x: chunk_gated_delta_rule)
    found = layer(x, dataclasses.replace(plain, mask_BST=None, boundaries=Boundaries.of(DOCUMENTS)), None)
    assert calls == [[0, 9, 23, 26, 27, 31, 46]]
    assert (found - expected).abs().max() <= TOLERANCE
