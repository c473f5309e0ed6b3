"""The experts' products in one launch, interpreted where there is no GPU, against ``triton_linear`` on each expert."""

import pytest
import torch

from qsharded.quant import backends, expert_rows, few_tokens, grouped, own_kernels
from qsharded.quant.expert_mlp import ExpertMLP, Update
from qsharded.quant.expert_product import expert_product
from qsharded.quant.experts import ExpertLinears, PackedExperts, PackedExpertWeights
from qsharded.quant.formats import QuantFormat
from qsharded.quant.own_kernels import triton_grouped_linear, triton_linear
from qsharded.quant.pieces import Pieces
from qsharded.quant.routing import Routed
from qsharded_kernels import triton_absmax, triton_experts, triton_grouped, triton_nf4, triton_tiles
from qsharded_kernels.triton_tiles import LinearTile
from tests.kernels.cases import assert_same_bits
from tests.kernels.packed_products import DEVICE, random

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

E, N, K = 5, 40, 320  # a tile of rows of W and part of another; five blocks, one more than a turn of the loop takes
TILE = LinearTile(32, 2, decoder="gather")


def packed(double_quant: bool) -> PackedExperts:
    torch.manual_seed(0)
    experts = ExpertLinears(E, K, N)
    with torch.no_grad():  # scales and offsets differ between experts
        experts.weight.mul_(torch.arange(1, E + 1)[:, None, None])
    return PackedExperts.from_experts(experts, quant_format=QuantFormat(), double_quant=double_quant).to(DEVICE)


# every expert and one row; some, more rows than a piece has, and none for one of them
@pytest.mark.parametrize("groups", [[(e, 1) for e in range(E)], [(1, 70), (2, 0), (4, 3)]], ids=["few", "many"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_group_has_the_product_with_its_expert(double_quant: bool, groups: list[tuple[int, int]]) -> None:
    weights, x = packed(double_quant).packed(), random(sum(rows for _, rows in groups), K).bfloat16()
    y = triton_grouped_linear(x, weights.tensors, weights.quant_format, Pieces.of(groups, x.device), tile=TILE)
    expected, first = [], 0
    for e, rows in groups:
        for piece in x[first : first + rows].split(64) if rows else ():
            expected.append(triton_linear(piece, weights.expert(e), None, tile=TILE, splits=1))
        first += rows
    assert_same_bits(y, torch.cat(expected))


def test_experts_do_not_take_the_tiles_that_were_measured_for_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[LinearTile] = []
    monkeypatch.setattr(triton_tiles, "linear_tile", lambda N, K, M, device: TILE)
    monkeypatch.setattr(triton_grouped, "grouped_linear", lambda *args, most, tile: taken.append(tile))
    weights, x = packed(True).packed(), random(1, K).bfloat16()
    triton_grouped_linear(x, weights.tensors, weights.quant_format, Pieces.of([(0, 1)], x.device))
    assert taken == [triton_tiles.DEFAULT]


def test_no_rows_are_no_launch() -> None:
    weights = packed(True).packed()
    none = Pieces.of([], torch.device(DEVICE))
    y = triton_grouped_linear(random(0, K).bfloat16(), weights.tensors, weights.quant_format, none, tile=TILE)
    assert y.shape == (0, N)


class Few:
    """Three tokens of two experts each, of which one is padding, on packed experts with biases and adapters."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        gate, up = packed(True), packed(True)
        down = PackedExperts.from_experts(ExpertLinears(E, 64, K), quant_format=QuantFormat()).to(DEVICE)
        self.weights = gate.packed(), up.packed(), down.packed()
        self.chosen = torch.tensor([[0, 4], [2, 4], [0, 2], [4, 1]], device=DEVICE)
        self.is_routed = torch.tensor([True, False, True, True], device=DEVICE)
        self.x, self.scores = random(4, K).bfloat16(), random(4, 2)
        self.biases = tuple(random(E, n).bfloat16() for n in (N, N, K))
        self.updates = (
            Update(random(E, 8, K).bfloat16(), random(E, 2 * N, 8).bfloat16(), 0.1),
            Update(random(E, 8, 64).bfloat16(), random(E, K, 8).bfloat16(), 0.1),
        )

    def result(self) -> torch.Tensor:
        mlp = ExpertMLP(*self.weights, self.biases, glu)
        return expert_product(self.x, self.scores, Routed.of(self.chosen, E, self.is_routed), mlp, *self.updates)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[Few, torch.Tensor]:
    """And what comes where experts are decoded. From then on kernels of GPUs serve, which here Triton interprets."""
    case = Few()
    with monkeypatch.context() as decoding:
        decoding.setattr(own_kernels, "_MOST_ROWS_OF_AN_EXPERT", 0)
        expected = case.result()
    served = own_kernels.TritonCuda(triton_nf4, triton_absmax, fuses=True)
    monkeypatch.setattr(backends, "_kernels", lambda device: (served,))
    monkeypatch.setattr(PackedExpertWeights, "decoded", None)
    return case, expected


def test_experts_with_few_tokens_are_multiplied_and_none_is_decoded(
    few: tuple[Few, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte budget for decoding is none of theirs."""
    case, expected = few
    monkeypatch.setattr("qsharded.quant.expert_product.DECODED_BYTES", 1)
    torch.testing.assert_close(case.result(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


def test_few_tokens_without_a_gradient_are_sorted_on_the_device(
    few: tuple[Few, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, expected = few
    monkeypatch.setattr(expert_rows, "_kernels", lambda like: triton_experts)
    monkeypatch.setattr(grouped, "is_one_launch", lambda x: True)
    monkeypatch.setattr(Routed, "counts", None)  # for which the host would wait
    found = case.result()
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))
    assert not found[~case.is_routed].any()


def test_updates_by_a_loop_are_not_taken_for_few_tokens(
    few: tuple[Few, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host would wait for the groups' ends in each of them."""
    monkeypatch.setattr(expert_rows, "_kernels", lambda like: triton_experts)
    monkeypatch.setattr(few_tokens, "few_tokens", None)
    case, expected = few
    torch.testing.assert_close(case.result(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


def test_what_needs_a_gradient_is_not_taken_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_rows, "_kernels", lambda like: triton_experts)
    monkeypatch.setattr(few_tokens, "few_tokens", None)
    case = Few()
    case.scores.requires_grad_()
    assert case.result().requires_grad


def glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Of 40 columns to the down projection's 64."""
    return torch.nn.functional.pad(torch.nn.functional.silu(gate) * up, (0, 64 - N))
