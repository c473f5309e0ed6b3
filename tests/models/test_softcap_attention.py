"""Soft-capped attention in chunks against its definition, and what of it is held at once."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qsharded.models import softcap_attention
from qsharded.models.attention_inputs import AttentionInputs, attention_inputs, attention_mask
from qsharded.models.config import ModelConfig
from qsharded.models.softcap_attention import SoftcapAttention

B, S, H, G, E, CAP = 2, 23, 4, 2, 8, 0.6
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14, [0] * 4 + [1] * 4 + [2] * 13 + [-1] * 2])


def tensors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, S, H, E), (B, S, G, E), (B, S, G, E)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


def by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    k, v = (tensor.repeat_interleave(H // G, dim=2) for tensor in (k, v))
    scores = CAP * torch.tanh(torch.einsum("bshe,bthe->bhst", q, k) * scale / CAP)
    return torch.einsum("bhst,bthe->bshe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def inputs_of(window: int | None, documents: Tensor | None, scale: float | None) -> AttentionInputs:
    config = ModelConfig(
        61, H * E, 64, 1, H, G, E, 64, layer_windows=(window,), score_softcap=CAP, attention_scale=scale
    )
    positions = torch.arange(S).expand(B, S)
    return attention_inputs(config, positions, torch.float64, documents_BT=documents)[0]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("queries_at_a_time", [1, 4, S])
def test_it_is_its_definition(
    window: int | None,
    documents: Tensor | None,
    scale: float | None,
    queries_at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(softcap_attention, "_SCORES_PER_CHUNK", queries_at_a_time * B * H * S)
    inputs, q_k_v, grad = inputs_of(window, documents, scale), tensors(), tensors()[0].detach()
    assert inputs.mask_BST is None, "an S x S mask"
    seen = attention_mask(S, S, documents, window, grad.device)
    if seen is None:
        seen = torch.ones(S, S, dtype=torch.bool).tril()
    expected = by_definition(*q_k_v, seen, scale or 1 / math.sqrt(E))
    out, saved = SoftcapAttention().forward(*q_k_v, inputs)
    gradients = SoftcapAttention().backward(grad, *(t.detach() for t in q_k_v), out.detach(), saved, inputs)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)
    for got, want in zip(gradients, torch.autograd.grad(expected, q_k_v, grad), strict=True):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=0)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [
            tensor.numel() for tensor in (made if isinstance(made, tuple) else (made,)) if isinstance(tensor, Tensor)
        ]
        self.values = max([self.values, *sizes])
        return made


@pytest.mark.parametrize("window", [None, 5])
def test_scores_of_one_chunk_are_all_that_is_made(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softcap_attention, "_SCORES_PER_CHUNK", 2 * B * H * S)
    inputs, (q, k, v) = inputs_of(window, DOCUMENTS, None), (t.detach() for t in tensors())
    with _Largest() as largest:
        out, saved = SoftcapAttention().forward(q, k, v, inputs)
        SoftcapAttention().backward(q, q, k, v, out, saved, inputs)
    assert largest.values <= max(q.numel(), 2 * B * H * (S if window is None else window + 1)) < B * H * S * S
