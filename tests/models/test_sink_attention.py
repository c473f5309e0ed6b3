"""Attention with sinks, against the softmax with one more score, by PyTorch's autograd in fp64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qsharded.models.attention import FlashAttention, attend
from qsharded.models.attention_inputs import AttentionInputs, attention_mask
from qsharded.models.sink_attention import with_sinks
from qsharded.utils.documents import Boundaries

B, S, H, G, E = 2, 9, 4, 2, 8
TABLE = torch.ones(1)


def qkv(dtype: torch.dtype = torch.float32, length: int = S, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (B, length, H, E), (B, length, G, E), (B, length, G, E)
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def sinks(device: str = "cpu") -> Tensor:
    return torch.linspace(-1, 2, H, device=device)


def exact(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, sees_BST: Tensor) -> Tensor:
    k, v = (tensor.repeat_interleave(H // G, dim=2) for tensor in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q, k) / E**0.5
    scores = scores.masked_fill(~sees_BST, -torch.inf)
    sink = sinks_H.to(q.dtype)[:, None, None].expand(B, H, q.shape[1], 1)
    probabilities = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhst,bthe->bshe", probabilities, v)


def all_of(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_near(got: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, right, strict=True):
        assert (one.double().cpu() - other.double().cpu()).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("window", [None, 3])
def test_by_masks(window: int | None) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 4] * B)
    mask = attention_mask(S, S, documents, window, torch.device("cpu"))
    leaves = qkv()
    inputs = AttentionInputs(TABLE, TABLE, mask_BST=mask, sinks_H=sinks())
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert_near(all_of(attend(*leaves, inputs), leaves), all_of(exact(*doubles, sinks(), mask), doubles), 1e-5)


def test_plain_causal_rows_and_one_query_that_sees_all() -> None:
    leaves, inputs = qkv(), AttentionInputs(TABLE, TABLE, sinks_H=sinks())
    causal = torch.ones(S, S, dtype=torch.bool).tril()[None, None]
    assert_near([attend(*leaves, inputs)], [exact(*(leaf.double() for leaf in leaves), sinks(), causal)], 1e-5)
    q = leaves[0][:, -1:]
    last = exact(q.double(), *(leaf.double() for leaf in leaves[1:]), sinks(), causal[:, :, -1:])
    assert_near([attend(q, *leaves[1:], inputs)], [last], 1e-5)


@pytest.mark.parametrize("end_to_end", [True, False])
def test_a_kernels_backward_is_right_once_it_gets_the_sinks_log_sum_exp(end_to_end: bool) -> None:
    """As FlashAttention computes it: dS = P (dP - <dO, O>), of P = exp(s - log-sum-exp) and the output that it gets."""
    q, k, v = (leaf.detach().double() for leaf in qkv())
    k, v = (tensor.repeat_interleave(H // G, dim=2) for tensor in (k, v))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    scores = (torch.einsum("bshe,bthe->bhst", *leaves[:2]) / E**0.5).masked_fill(~causal, -torch.inf)
    log_sum_exp = scores.logsumexp(-1)
    given = log_sum_exp.transpose(0, 1).flatten(1) if end_to_end else log_sum_exp
    out, with_sink = with_sinks(torch.einsum("bhst,bthe->bshe", scores.softmax(-1), v), given, sinks())
    if end_to_end:
        with_sink = with_sink.unflatten(1, (B, S)).transpose(0, 1)
    sink = sinks().double()[:, None, None].expand(B, H, S, 1)
    p = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    right = torch.einsum("bhst,bthe->bshe", p, v)
    expected = all_of(right, leaves)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    P = torch.exp(scores - with_sink[..., None])
    dS = P * (torch.einsum("bshe,bthe->bhst", grad, v) - (grad * out).sum(-1).transpose(1, 2)[..., None]) / E**0.5
    got = [
        out,
        torch.einsum("bhst,bthe->bshe", dS, k),
        torch.einsum("bhst,bshe->bthe", dS, q),
        torch.einsum("bhst,bshe->bthe", P, grad),
    ]
    assert_near(got, expected, 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 37])
def test_flash_attention_with_documents_on_a_gpu(window: int | None) -> None:
    length = 128
    documents = torch.tensor([[0] * 50 + [1] * 78] * B, device="cuda")
    mask = attention_mask(length, length, documents, window, torch.device("cuda"))
    leaves = qkv(torch.bfloat16, length, "cuda")
    inputs = AttentionInputs(TABLE, TABLE, window, Boundaries.of(documents), sinks_H=sinks("cuda"))
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = all_of(exact(*doubles, sinks("cuda"), mask), doubles)
    assert_near(all_of(attend(*leaves, inputs), leaves), right, 0.02)
    plain = FlashAttention().forward(*leaves, replace(inputs, sinks_H=None))[0]
    assert (plain.double() - right[0]).abs().max() > 0.1 * right[0].abs().max(), "the sinks would not show"
