"""The experts' products in one launch, interpreted where there is no GPU, against ``triton_linear`` on each expert."""

import pytest
import torch

from qsharded.quant import backends, own_kernels
from qsharded.quant.expert_product import ExpertMLP, expert_product
from qsharded.quant.experts import ExpertLinears, PackedExperts, PackedExpertWeights
from qsharded.quant.formats import QuantFormat
from qsharded.quant.own_kernels import triton_grouped_linear, triton_linear
from qsharded.quant.routing import Routed
from qsharded_kernels import triton_absmax, triton_nf4
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
    y = triton_grouped_linear(x, weights.tensors, weights.quant_format, groups, tile=TILE)
    expected, first = [], 0
    for e, rows in groups:
        for piece in x[first : first + rows].split(64) if rows else ():
            expected.append(triton_linear(piece, weights.expert(e), None, tile=TILE, splits=1))
        first += rows
    assert_same_bits(y, torch.cat(expected))


def test_no_rows_are_no_launch() -> None:
    weights = packed(True).packed()
    y = triton_grouped_linear(random(0, K).bfloat16(), weights.tensors, weights.quant_format, [], tile=TILE)
    assert y.shape == (0, N)


def test_experts_with_few_tokens_are_multiplied_and_none_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels of GPUs serve, which here Triton interprets; a byte budget for decoding is none of theirs."""
    layers = [
        packed(True),
        packed(True),
        PackedExperts.from_experts(ExpertLinears(E, 64, K), quant_format=QuantFormat()),
    ]
    layers[2] = layers[2].to(DEVICE)
    chosen = torch.tensor([[0, 4], [2, 4], [0, 2]], device=DEVICE)
    x, scores = random(3, K).bfloat16(), random(3, 2)

    def result() -> torch.Tensor:
        mlp = ExpertMLP(*(layer.packed() for layer in layers), (None, None, None), glu)
        return expert_product(x, scores, Routed.of(chosen, E), mlp)

    monkeypatch.setattr(own_kernels, "_MOST_ROWS_OF_AN_EXPERT", 0)
    expected = result()
    monkeypatch.undo()
    served = own_kernels.TritonCuda(triton_nf4, triton_absmax, fuses=True)
    monkeypatch.setattr(backends, "_kernels", lambda device: (served,))
    monkeypatch.setattr(PackedExpertWeights, "decoded", None)
    monkeypatch.setattr("qsharded.quant.expert_product.DECODED_BYTES", 1)
    torch.testing.assert_close(result(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


def glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Of 40 columns to the down projection's 64."""
    return torch.nn.functional.pad(torch.nn.functional.silu(gate) * up, (0, 64 - N))
