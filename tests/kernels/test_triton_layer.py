"""The kernels between a layer's products against the formulas in their heads; interpreted where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded_kernels import triton_cross_entropy, triton_rms_norm, triton_rotary, triton_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# The interpreter truncates to bf16, so bf16 is held to its own rounding on a GPU alone.
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Everything is computed in fp32 in another order than PyTorch's; bf16 rounds what is stored to 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Relative to the largest value: sums of a row's products carry its rounding into small ones."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE[actual.dtype], f"{error:.2e}"


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad.double())


def leaf(tensor: Tensor) -> Tensor:
    return tensor.double().requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_and_its_gradient(dtype: torch.dtype, width: int, residual: bool) -> None:
    x, weight, grad = random(3, width, dtype=dtype), random(width, dtype=dtype, seed=1), random(3, width, dtype=dtype)
    added = random(3, width, dtype=dtype, seed=2) if residual else None
    h = leaf(x if added is None else (x + added))
    y = F.rms_norm(h, (width,), weight.double(), EPS)
    room = x.new_full((3, width + 8), torch.nan)
    actual, rstd, actual_h = triton_rms_norm.forward(x, weight, EPS, added, room[:, :width])
    assert_close(actual, y)
    assert_close(actual_h, h)
    assert room[:, width:].isnan().all(), "wrote behind a row"
    assert (actual_h is x) == (added is None)
    around = random(3, width, dtype=dtype, seed=3) if residual else None
    (expected,) = gradients(y, grad, h)
    actual = triton_rms_norm.backward(grad, actual_h, weight, rstd, around)
    assert_close(actual, expected if around is None else expected + around.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [72, 2056])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu_and_its_gradient(dtype: torch.dtype, width: int, activation: str) -> None:
    gate_up, grad = random(3, 2 * width, dtype=dtype), random(3, width, dtype=dtype, seed=1)
    wide = leaf(gate_up)
    gate, up = wide.chunk(2, dim=-1)
    act = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    assert_close(triton_swiglu.forward(gate_up, activation=activation), act)
    (expected,) = gradients(act, grad, wide)
    triton_swiglu.backward_(grad, gate_up, activation)
    assert_close(gate_up, expected)
    assert_close(grad, act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 16), (3, 3, 24)])
@pytest.mark.parametrize(("fraction", "interleaved"), [(1, False), (0.75, False), (1, True), (0.5, True)])
def test_rotary_and_its_gradient(
    dtype: torch.dtype,
    has_norms: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    fraction: float,
    interleaved: bool,
) -> None:
    rows, length = 2, 5
    tokens, together = rows * length, heads + kv_heads
    qkv = random(tokens, (together + kv_heads) * head_dim, dtype=dtype)
    angles = random(tokens, int(head_dim * fraction) // 2, seed=1).repeat(1, 2)
    # a factor on both tables, as YaRN has it
    tables = (1.3 * angles.cos()).to(dtype), (1.3 * angles.sin()).to(dtype)
    norms = (random(head_dim, dtype=dtype, seed=2), random(head_dim, dtype=dtype, seed=3)) if has_norms else None
    wide = leaf(qkv)
    expected = rotated(wide.view(tokens, -1, head_dim), tables, norms, heads, together, interleaved)
    out = torch.empty(tokens, together * head_dim, dtype=dtype, device=DEVICE)
    found = triton_rotary.forward_(
        qkv, *tables, heads, kv_heads, norms, EPS, out, head_dim=head_dim, interleaved=interleaved
    )
    assert_close(found, expected[:, :together].flatten(1))
    # memory in another order, as some attention kernels return it
    grads = [
        random(rows, n, length, head_dim, dtype=dtype, seed=4).transpose(1, 2) for n in (heads, kv_heads, kv_heads)
    ]
    together_grads = torch.cat([grad.reshape(tokens, -1, head_dim) for grad in grads], dim=1)
    (expected_grad,) = gradients(expected, together_grads, wide)
    found = triton_rotary.backward(tuple(grads), *tables, qkv, norms, EPS, interleaved=interleaved)
    assert_close(found, expected_grad)


def rotated(
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    heads: int,
    together: int,
    interleaved: bool,
) -> Tensor:
    q, k, v = x[:, :heads], x[:, heads:together], x[:, together:]
    if norms is not None:
        q, k = (F.rms_norm(t, t.shape[-1:], w.double(), EPS) for t, w in zip((q, k), norms, strict=True))
    q_k = torch.cat((q, k), dim=1)
    pairs = tables[0].shape[1] // 2
    turned, rest = q_k[..., : 2 * pairs], q_k[..., 2 * pairs :]
    cos, sin = (table.double()[:, None, :pairs] for table in tables)
    low, high = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    both = low * cos - high * sin, high * cos + low * sin
    turned = torch.stack(both, dim=-1).flatten(-2) if interleaved else torch.cat(both, dim=-1)
    return torch.cat((torch.cat((turned, rest), dim=-1), v), dim=1)


def test_rotary_in_place_leaves_v_alone() -> None:
    qkv, angles = random(3, 4 * 16), random(3, 8, seed=1).repeat(1, 2)
    before = qkv.clone()
    triton_rotary.forward_(qkv, angles.cos(), angles.sin(), 2, 1)
    assert torch.equal(qkv[:, 48:], before[:, 48:])
    assert not torch.equal(qkv[:, :48], before[:, :48])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "softcap"), [(50, None), (8192, None), (20000, None), (50, 4.0), (9000, 4.0)])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, vocabulary: int, softcap: float | None) -> None:
    logits = random(5, vocabulary, dtype=dtype) * 3
    targets = torch.tensor([0, vocabulary - 1, -100, 7, 49], device=DEVICE)
    wide = leaf(logits)
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    expected = F.cross_entropy(capped, targets, ignore_index=-100, reduction="none")
    (expected_grad,) = gradients(expected, torch.ones(5, device=DEVICE), wide)
    losses = triton_cross_entropy.forward_(logits, targets, -100, softcap)
    assert losses.dtype == torch.float32
    assert_close(losses, expected)
    assert_close(logits, expected_grad)
    assert logits[2].count_nonzero() == 0


def test_cross_entropy_of_large_logits_does_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], device=DEVICE)
    losses = triton_cross_entropy.forward_(logits, torch.tensor([1], device=DEVICE), -100)
    assert losses.tolist() == [2e4]
    assert logits.tolist() == [[1.0, -1.0, 0.0]]


def test_a_target_outside_the_vocabulary_shows_in_its_loss() -> None:
    losses = triton_cross_entropy.forward_(random(2, 10), torch.tensor([10, 3], device=DEVICE), -100)
    assert losses.isnan().tolist() == [True, False]
