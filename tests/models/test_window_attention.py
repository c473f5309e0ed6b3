"""A window as two causal attentions, by a causal attention that is as cuDNN's: it knows no windows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded.models import attention, window_attention
from qsharded.models.attention import FlashAttention, choose_attention
from qsharded.models.attention_inputs import AttentionInputs, attention_mask
from qsharded.models.window_attention import WindowAttention, agree
from qsharded.utils.documents import Boundaries

B, H, G, E = 2, 4, 2, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PlainCausal:
    """softmax(q k^T / sqrt(E)) v over earlier keys; its gradients are by the output and log-sum-exp it is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, tuple[Any, ...]]:
        assert inputs.window is None
        scores = self._scores(q, k)
        return torch.einsum("bhst,bthe->bshe", scores.softmax(-1), _each(v)), (scores.logsumexp(-1)[..., None],)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...], inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        (log_sum,) = saved
        p = (self._scores(q, k) - log_sum).exp()
        dp = torch.einsum("bshe,bthe->bhst", grad, _each(v))
        ds = p * (dp - (grad * out).sum(-1).transpose(1, 2)[..., None]) / E**0.5
        grad_k, grad_v = torch.einsum("bhst,bshe->bthe", ds, q), torch.einsum("bhst,bshe->bthe", p, grad)
        of_groups = (t.unflatten(2, (G, H // G)).sum(3) for t in (grad_k, grad_v))
        return torch.einsum("bhst,bthe->bshe", ds, _each(k)), *of_groups

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bshe,bthe->bhst", q, _each(k)) / E**0.5
        return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)


def _each(t: Tensor) -> Tensor:
    return t.repeat_interleave(H // G, dim=2)


def tensors(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, length, heads, E) for heads in (H, G, G, H)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    scores = torch.einsum("bshe,bthe->bhst", q, _each(k)) / E**0.5
    seen = attention_mask(q.shape[1], q.shape[1], None, window, q.device)
    return torch.einsum("bhst,bthe->bshe", scores.masked_fill(~seen, -torch.inf).softmax(-1), _each(v))


def gaps(length: int, window: int, dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients, relative to the largest value."""
    q, k, v, grad = tensors(length, dtype)
    inputs = AttentionInputs(q, q, window=window, boundaries=Boundaries.of_rows(B, length, q.device))
    halves = WindowAttention(PlainCausal())
    out, saved = halves.forward(q, k, v, inputs)
    found = out, *halves.backward(grad, q, k, v, out, saved, inputs)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    exact = by_definition(*leaves, window)
    wanted = exact, *torch.autograd.grad(exact, leaves, grad.double())
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("length", [8, 12, 13, 23])
def test_it_is_its_definition(length: int) -> None:
    """Of whole chunks, and with a last one of which most or least is empty."""
    assert max(gaps(length, 4, torch.float64)) <= 1e-14


@pytest.mark.parametrize("length", [8, 23])
def test_the_kernels_give_the_same(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where those of CPUs are PyTorch's."""
    asked: list[Tensor] = []
    monkeypatch.setattr(window_attention, "takes_triton", lambda tensor: asked.append(tensor) is None)
    assert max(gaps(length, 4, torch.float32)) <= 2e-6
    assert asked


class Whole:
    """The window by its definition, and by autograd; of ``wrong`` tokens the output is another."""

    def __init__(self, wrong: int = 0) -> None:
        self._wrong = wrong

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, tuple[Any, ...]]:
        out = by_definition(q, k, v, inputs.window)
        out[:, : self._wrong] = 0
        return out, ()

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(by_definition(*leaves, 4), leaves, grad)


def test_two_backends_agree_unless_some_tokens_differ() -> None:
    q, k, v, _ = tensors(12, torch.float64)
    assert agree(WindowAttention(PlainCausal()), Whole(), 4, q, k, v)
    assert not agree(WindowAttention(PlainCausal()), Whole(wrong=1), 4, q, k, v)


@pytest.mark.parametrize("right", [True, False])
def test_cudnn_is_tried_before_it_is_trusted(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "agree", lambda *_: right)
    monkeypatch.setattr(attention, "_TRIED_WINDOW", 4)
    attention._halves_are_right.cache_clear()
    assert attention._halves_are_right(torch.device("cpu"), torch.bfloat16, 128) == right
    attention._halves_are_right.cache_clear()


@pytest.mark.parametrize(
    ("length", "window", "documents", "head_dim", "two_halves"),
    [
        (16384, 4096, False, 128, True),
        (16000, 4096, False, 128, True),
        (4104, 4096, False, 128, False),  # a second chunk for eight tokens
        (16384, 4096, True, 128, False),
        (16384, 4096, False, 256, False),
        (2048, 512, False, 128, False),
    ],
)
def test_it_serves_rows_of_long_windows(
    length: int, window: int, documents: bool, head_dim: int, two_halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Hopper GPU whose cuDNN was found to be right."""
    monkeypatch.setattr(attention, "_halves_are_right", lambda *_: True)
    on_gpu = SimpleNamespace(
        is_cuda=True, is_meta=False, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, length, 64)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table, boundaries = torch.zeros(1, 1, head_dim), Boundaries.of_rows(1, length, torch.device("cpu"))
    if documents:
        boundaries = Boundaries.of((torch.arange(length) // 999)[None])
    inputs = AttentionInputs(table, table, window=window, boundaries=boundaries)
    expected = WindowAttention if two_halves else FlashAttention
    assert type(choose_attention(on_gpu, inputs, head_dim)) is expected


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("length", [4096, 4000])
def test_cudnns_halves_are_as_near_to_fp32_as_flash_attention(length: int) -> None:
    from qsharded.models.attention import CudnnAttention

    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(2, length, heads, 128) for heads in (8, 2, 2, 8)]
    q, k, v, grad = (torch.randn(s, generator=generator, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
    inputs = AttentionInputs(q, q, window=1024, boundaries=Boundaries.of_rows(2, length, q.device))
    leaves = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    each = [leaves[0], *(leaf.repeat_interleave(4, dim=2) for leaf in leaves[1:])]
    seen = attention_mask(length, length, None, 1024, q.device)
    q_k_v = [tensor.transpose(1, 2) for tensor in each]
    exact = torch.nn.functional.scaled_dot_product_attention(*q_k_v, attn_mask=seen).transpose(1, 2)
    wanted = exact, *torch.autograd.grad(exact, leaves, grad.float())

    def errors(attention: Any) -> list[float]:
        out, saved = attention.forward(q, k, v, inputs)
        found = out, *attention.backward(grad, q, k, v, out, saved, inputs)
        return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]

    ours, flash = errors(WindowAttention(CudnnAttention())), errors(FlashAttention())
    assert all(our <= 1.5 * theirs for our, theirs in zip(ours, flash, strict=True)), (ours, flash)
