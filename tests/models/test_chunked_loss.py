import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qsharded.models.chunked_loss import chunked_cross_entropy, chunked_log_probs

TOKENS, DIM, VOCAB = 29, 12, 41
# Sums of a few dozen terms in another order: some 1e-15 in fp64 and 1e-6 in fp32, of values near 1. In bf16 the
# logits' gradients are rounded once (2^-9) before the last matmul, as they are in an unfused bf16 model.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[[0, 5, 6, TOKENS - 1]] = -100
    return hidden, weight, targets


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss / 3 and its gradients in fp64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(capped(hidden @ weight.T, softcap), targets, reduction="sum") / 3
    loss.backward()
    return loss, hidden.grad, weight.grad


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [1, 4, TOKENS - 1, TOKENS, 1000, None])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_value_and_gradients_equal_cross_entropy(
    dtype: torch.dtype, chunk_size: int | None, softcap: float | None
) -> None:
    hidden, weight, targets = inputs(dtype)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_size, softcap)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (loss / 3).backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact = reference(hidden, weight, targets, softcap)
    for got, expected in zip((loss / 3, hidden.grad, weight.grad), exact, strict=True):
        atol = TOLERANCES[dtype] * expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [1, 4, TOKENS, None])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_log_probabilities_and_their_gradients_equal_log_softmax(
    dtype: torch.dtype, chunk_size: int | None, softcap: float | None
) -> None:
    """Each token with a weight of its own, as a preference loss has them."""
    hidden, weight, targets = inputs(dtype)
    factors = torch.linspace(-2, 3, TOKENS, dtype=torch.float64)
    log_probs = chunked_log_probs(hidden, weight, targets, chunk_size, softcap)
    assert log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (log_probs * factors).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = capped(exact[0] @ exact[1].T, softcap).log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    expected = expected * (targets != -100)
    (expected * factors).sum().backward()
    for got, want in zip((log_probs, hidden.grad, weight.grad), (expected, exact[0].grad, exact[1].grad), strict=True):
        torch.testing.assert_close(got.double(), want, atol=TOLERANCES[dtype] * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_log_probabilities_leave_a_frozen_input_alone(frozen: str) -> None:
    hidden, weight, targets = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    (-chunked_log_probs(hidden, weight, targets, 4).sum() / 3).backward()
    _, expected_hidden, expected_weight = reference(hidden, weight, targets)
    trained, expected = (weight, expected_weight) if frozen == "hidden" else (hidden, expected_hidden)
    assert {"hidden": hidden, "weight": weight}[frozen].grad is None
    torch.testing.assert_close(trained.grad, expected, atol=1e-13, rtol=0)


def test_many_bf16_chunks_add_up_without_loss() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    hidden = hidden.detach().repeat(40, 1)
    targets = targets.repeat(40)
    (chunked_cross_entropy(hidden, weight, targets, 1) / 3).backward()
    _, _, expected = reference(hidden, weight, targets)
    # Only the result is rounded to bf16 (2^-9), and each term beforehand; sums of 1,160 terms in bf16 err by 5%.
    atol = 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(weight.grad.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_none(frozen: str) -> None:
    hidden, weight, targets = inputs()
    _, expected_hidden, expected_weight = reference(hidden, weight, targets)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    (chunked_cross_entropy(hidden, weight, targets, 4) / 3).backward()
    assert {"hidden": hidden, "weight": weight}[frozen].grad is None
    got, expected = (weight.grad, expected_weight) if frozen == "hidden" else (hidden.grad, expected_hidden)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_nothing_trained_on_is_zero_loss_and_zero_gradients() -> None:
    hidden, weight, _ = inputs()
    loss = chunked_cross_entropy(hidden, weight, torch.full((TOKENS,), -100), 4)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        hidden *= 1e4
    loss = chunked_cross_entropy(hidden, weight, targets, 4)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))
    loss.backward()
    assert hidden.grad.isfinite().all()


class _Largest(TorchDispatchMode):
    """Notes the most rows of any tensor as wide as the vocabulary (views aside), and the number of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.matmuls += func.overloadpacket is torch.ops.aten.mm
        if not func.is_view and getattr(result, "shape", ())[1:] == (VOCAB,):
            self.rows = max(self.rows, result.shape[0])
        return result


@pytest.mark.parametrize(("grad", "matmuls_a_chunk"), [(True, 2), (False, 1)])
def test_full_logits_never_exist(grad: bool, matmuls_a_chunk: int) -> None:
    hidden, weight, targets = inputs()
    weight.requires_grad_(False)
    with _Largest() as seen, torch.set_grad_enabled(grad):
        loss = chunked_cross_entropy(hidden, weight, targets, 4)
        if grad:
            loss.backward()
    assert seen.rows == 4
    assert seen.matmuls == matmuls_a_chunk * -(-TOKENS // 4)
