"""The experts' node against the sum over tokens and experts as it is written, by PyTorch's autograd in fp64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.quant import expert_product, expert_rows, grouped
from qsharded.quant.expert_mlp import ExpertMLP, Update
from qsharded.quant.expert_rows import Glu, silu_product
from qsharded.quant.experts import ExpertLinears, PackedExperts
from qsharded.quant.formats import QuantFormat
from qsharded.quant.routing import Routed
from qsharded_kernels import triton_experts
from tests.kernels.packed_products import DEVICE

M, k, E, D, J, r = 11, 3, 6, 64, 128, 3
MATRIX = 4 * D * J


def glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * (up + 1)


@pytest.fixture(params=[1 * MATRIX, 2 * MATRIX, 1 << 30], ids=["an expert at a time", "two", "all"])
def budget(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(expert_product, "DECODED_BYTES", request.param)


class Case:
    """Random experts, of which the last gets no token, and tokens of which two are padding."""

    glu: Glu = staticmethod(glu)

    def __init__(self, *, packed: bool, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.layers = [ExpertLinears(E, K, N, bias).requires_grad_(False) for N, K in ((J, D), (J, D), (D, J))]
        for layer in self.layers:
            layer.weight.normal_(std=0.2)
            if layer.bias is not None:
                layer.bias.normal_()
        if packed:
            self.layers = [PackedExperts.from_experts(layer, quant_format=QuantFormat()) for layer in self.layers]
        self.x = torch.randn(M, D, dtype=dtype).requires_grad_()
        self.chosen = torch.stack([torch.randperm(E - 1)[:k] for _ in range(M)])
        self.is_routed = torch.ones(M, dtype=torch.bool)
        self.is_routed[[2, 7]] = False
        self.scores = torch.rand(M, k).requires_grad_()
        shapes = (E, r, D), (E, 2 * J, r), (E, r, J), (E, D, r)
        self.factors = [torch.randn(shape, dtype=dtype).mul_(0.3).requires_grad_() for shape in shapes]

    def result(self, *, adapted: bool = True) -> Tensor:
        biases = tuple(None if layer.bias is None else layer.bias.to(self.x.dtype) for layer in self.layers)
        mlp = ExpertMLP(*(layer.packed() for layer in self.layers), biases, self.glu)
        A_in, B_in, A_out, B_out = self.factors
        updates = (Update(A_in, B_in, 0.5), Update(A_out, B_out, 0.25)) if adapted else ()
        routed = Routed.of(self.chosen, E, self.is_routed)
        return expert_product.expert_product(self.x, self.scores, routed, mlp, *updates)

    def leaves(self, *, adapted: bool = True) -> list[Tensor]:
        return [self.x, self.scores, *(self.factors if adapted else [])]

    def expected(self, leaves: list[Tensor]) -> Tensor:
        """In fp64, token by token."""
        x, scores, *factors = leaves
        gate, up, down = (layer.packed().decoded(range(E), torch.float64) for layer in self.layers)
        if factors:
            A_in, B_in, A_out, B_out = factors
            gate, up, down = gate + 0.5 * B_in[:, :J] @ A_in, up + 0.5 * B_in[:, J:] @ A_in, down + 0.25 * B_out @ A_out
        b_gate, b_up, b_down = (0 if layer.bias is None else layer.bias.double() for layer in self.layers)
        b_gate, b_up, b_down = (torch.zeros(E, 1) if isinstance(b, int) else b for b in (b_gate, b_up, b_down))
        rows = []
        for m in range(M):
            row = torch.zeros(D, dtype=torch.float64)
            for j, e in enumerate(self.chosen[m].tolist() if self.is_routed[m] else []):
                h = self.glu(gate[e] @ x[m] + b_gate[e], up[e] @ x[m] + b_up[e])
                row = row + scores[m, j] * (down[e] @ h + b_down[e])
            rows.append(row)
        return torch.stack(rows)


def gradients(made: Tensor, leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((made * weight).sum(), leaves))


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_result_and_gradients(packed: bool, bias: bool, adapted: bool) -> None:
    case, weight = Case(packed=packed, bias=bias), torch.randn(M, D)
    leaves = case.leaves(adapted=adapted)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    made, expected = case.result(adapted=adapted), case.expected(exact)
    pairs = zip(
        [made, *gradients(made, leaves, weight)], [expected, *gradients(expected, exact, weight.double())], strict=True
    )
    for got, right in pairs:
        assert right.abs().max() > 0
        assert (got.double() - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.usefixtures("budget")
def test_by_the_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what lies between the products: with silu, which they know, here interpreted."""
    monkeypatch.setattr(expert_rows, "_kernels", lambda like: None if like.dtype == torch.float64 else triton_experts)
    with torch.device(DEVICE):
        case, weight = Case(packed=True, bias=True), torch.randn(M, D)
        case.glu = silu_product
        exact = [leaf.detach().double().requires_grad_() for leaf in case.leaves()]
        made, expected = case.result(), case.expected(exact)
    right = [expected, *gradients(expected, exact, weight.double())]
    for got, other in zip([made, *gradients(made, case.leaves(), weight)], right, strict=True):
        assert (got.double() - other).abs().max() <= 1e-5 * other.abs().max()


def test_padding_and_experts_without_tokens_get_nothing() -> None:
    case = Case(packed=True, bias=True)
    made = case.result()
    made.sum().backward()
    assert not made[~case.is_routed].any()
    assert not case.x.grad[~case.is_routed].any()
    assert not case.factors[0].grad[E - 1].any()


def test_nothing_of_an_expert_without_tokens_is_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    case = Case(packed=True, bias=False)
    weights = type(case.layers[0].packed())
    decoded = weights.decoded

    def noted(self: Any, chosen: Any, dtype: torch.dtype) -> Tensor:
        seen.update(torch.arange(E)[chosen].tolist())
        return decoded(self, chosen, dtype)

    monkeypatch.setattr(weights, "decoded", noted)
    case.result().sum().backward()
    assert seen == set(case.chosen[case.is_routed].flatten().tolist())
    assert E - 1 not in seen


def test_saved_for_the_backward_is_nothing_wide() -> None:
    """Tokens, gate and up of each pair, and what was there before: no decoded matrix, no pair's input or output."""
    case, saved = Case(packed=True, bias=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        case.result()
    there = {
        tensor.untyped_storage().data_ptr()
        for layer in case.layers
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    there |= {tensor.untyped_storage().data_ptr() for tensor in (case.x, case.scores, *case.factors)}
    new = {tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in there}
    R = int(case.is_routed.sum()) * k
    assert new == {(R, J), (R,), (M, k)}


@pytest.mark.parametrize("all_at_once", [True, False])
def test_the_kernel_for_bf16_gives_what_the_loop_gives(all_at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts at once, of which the host need not know the counts, and some at a time."""
    if not hasattr(torch, "_grouped_mm"):
        pytest.fail("this PyTorch has no torch._grouped_mm: the path that GPUs take cannot be tried")
    case, weight = Case(packed=True, bias=True, dtype=torch.bfloat16), torch.randn(M, D)
    case.factors = [
        F.pad(f, (0, 0, 0, 5) if f.shape[1] == r else (0, 5)).detach().requires_grad_() for f in case.factors
    ]
    loop = [case.result(), *gradients(case.result(), case.leaves(), weight)]
    monkeypatch.setattr(grouped, "has_kernel", lambda x: x.dtype == torch.bfloat16)
    if all_at_once:
        monkeypatch.setattr(Routed, "counts", None)
    else:
        monkeypatch.setattr(expert_product, "DECODED_BYTES", MATRIX)
    kernel = [case.result(), *gradients(case.result(), case.leaves(), weight)]
    for got, right in zip(kernel, loop, strict=True):
        assert (got.float() - right.float()).abs().max() <= 0.02 * right.float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_in_bf16_on_a_gpu(bias: bool) -> None:
    """By torch._grouped_mm, against fp64 on the CPU: as near as bf16 is, for outputs and every gradient."""
    case = Case(packed=True, bias=bias, dtype=torch.bfloat16)
    case.factors = [F.pad(f, (0, 0, 0, 5) if f.shape[1] == r else (0, 5)).detach() for f in case.factors]
    exact = [leaf.detach().double().requires_grad_() for leaf in case.leaves()]
    weight = torch.randn(M, D)
    expected = case.expected(exact)
    right = [expected, *gradients(expected, exact, weight.double())]
    case.layers = [layer.cuda() for layer in case.layers]
    case.chosen, case.is_routed = case.chosen.cuda(), case.is_routed.cuda()
    case.x, case.scores, *case.factors = [leaf.detach().cuda().requires_grad_() for leaf in case.leaves()]
    made = case.result()
    got = [made, *gradients(made, case.leaves(), weight.cuda())]
    for one, other in zip(got, right, strict=True):
        assert (one.double().cpu() - other).abs().max() <= 0.03 * other.abs().max()
