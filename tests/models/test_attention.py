"""Attention backends from outside, behind a layer as it is written and behind a fused one."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.fused.layer import fused_forward
from qsharded.models import self_attention
from qsharded.models.attention import (
    Attention,
    CudnnAttention,
    FlashAttention,
    Saved,
    attend,
    choose_attention,
    register_attention,
    unregister_attention,
)
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.decoder import DecoderLayer
from qsharded.nn import LoRAConfig
from tests.fused.test_layer import CONFIG, DOCUMENTS, activations, assert_same, inputs_of, layer_of, results

CAP = 0.3


def capped(q: Tensor, k: Tensor, v: Tensor, mask_BST: Tensor | None) -> Tensor:
    """Gemma 2's attention: scores within +-CAP, by tanh."""
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=2) for tensor in (k, v))
    scores_BHST = torch.einsum("bshe,bthe->bhst", q, k) / q.shape[-1] ** 0.5
    visible = torch.ones(length, length, dtype=torch.bool).tril() if mask_BST is None else mask_BST
    scores_BHST = (CAP * torch.tanh(scores_BHST / CAP)).masked_fill(~visible, -torch.inf)
    return torch.einsum("bhst,bthe->bshe", scores_BHST.softmax(-1), v)


class Capped:
    """Saves a tensor and a number, and counts its forwards and backwards."""

    def __init__(self) -> None:
        self.forwards, self.backwards = 0, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]:
        self.forwards += 1
        return capped(q, k, v, inputs.mask_BST), (q.sum(), self.forwards)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, number = saved
        assert torch.equal(total, q.sum())
        assert number == self.forwards
        self.backwards += 1
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            again = capped(leaves[0], leaves[1], leaves[2], inputs.mask_BST)
        grad_q, grad_k, grad_v = torch.autograd.grad(again, leaves, grad)
        return grad_q, grad_k, grad_v


@pytest.fixture
def outside() -> Iterator[Capped]:
    """For heads of CONFIG's size, before one that wants nothing."""
    capped = Capped()

    def find(x: Tensor, inputs: AttentionInputs, head_dim: int) -> Attention | None:
        return capped if x.dtype == torch.float64 and head_dim == CONFIG.head_dim else None

    def find_nothing(x: Tensor, inputs: AttentionInputs, head_dim: int) -> Attention | None:
        return None

    register_attention(find)
    register_attention(find_nothing)
    yield capped
    unregister_attention(find)
    unregister_attention(find_nothing)


def layer_and_input() -> tuple[DecoderLayer, Tensor]:
    return layer_of(CONFIG, LoRAConfig(r=4)), activations().requires_grad_()


def by_definition(layer: DecoderLayer, x: Tensor, inputs: AttentionInputs) -> Tensor:
    """The layer with nothing but the capped attention and autograd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_attention, "attend", lambda q, k, v, inputs: capped(q, k, v, inputs.mask_BST))
        return layer(x, inputs)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
def test_a_backend_from_outside_serves_both_forms_of_a_layer(outside: Capped, documents: Tensor | None) -> None:
    (layer, x), inputs = layer_and_input(), inputs_of(CONFIG, documents)
    expected = results(by_definition(layer, x, inputs), layer, x)
    assert outside.forwards == 0
    assert_same(results(layer(x, inputs), layer, x), expected)
    assert (outside.forwards, outside.backwards) == (1, 1)
    assert_same(results(fused_forward(layer, x, inputs), layer, x), expected)
    assert (outside.forwards, outside.backwards) == (2, 2)


def test_what_nobody_from_outside_wants_goes_to_ours(outside: Capped) -> None:
    q, k, v = torch.randn(3, 1, 5, 2, CONFIG.head_dim)  # fp32, of which the one from outside wants nothing
    out = attend(q, k, v, AttentionInputs(q, q))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert outside.forwards == 0


def test_what_is_not_registered_cannot_be_taken_back() -> None:
    with pytest.raises(ValueError, match="is not registered"):
        unregister_attention(lambda x, inputs, head_dim: None)


@pytest.mark.parametrize(("head_dim", "backend"), [(128, CudnnAttention), (256, FlashAttention)])
def test_wide_heads_are_left_to_flash_attention(
    head_dim: int, backend: type[Attention], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Hopper GPU, of which rows of one document each would go to cuDNN."""
    on_gpu = SimpleNamespace(
        is_cuda=True, is_meta=False, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(2, 2048, 64)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table = torch.zeros(1, 1, head_dim)
    assert type(choose_attention(on_gpu, AttentionInputs(table, table), head_dim)) is backend
