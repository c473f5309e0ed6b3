"""The experts' products in one launch, interpreted where there is no GPU, against ``triton_linear`` on each expert."""

import pytest
import torch

from qsharded.quant.experts import ExpertLinears, PackedExperts
from qsharded.quant.formats import QuantFormat
from qsharded.quant.own_kernels import triton_grouped_linear, triton_linear
from qsharded_kernels.triton_tiles import LinearTile
from tests.kernels.cases import assert_same_bits
from tests.kernels.packed_products import DEVICE, random

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

E, N, K = 5, 40, 320  # a tile of rows of W and part of another; five blocks, one more than a turn of the loop takes
TILE = LinearTile(32, 2, decoder="gather")


def packed(double_quant: bool) -> PackedExperts:
    torch.manual_seed(0)
    experts = ExpertLinears(E, K, N, bias=True)
    with torch.no_grad():  # scales and offsets differ between experts
        experts.weight.mul_(torch.arange(1, E + 1)[:, None, None])
        experts.bias.normal_()
    return PackedExperts.from_experts(experts, quant_format=QuantFormat(), double_quant=double_quant).to(DEVICE)


# every expert and one row; some, more rows than a piece has, and none for one of them
@pytest.mark.parametrize("groups", [[(e, 1) for e in range(E)], [(1, 70), (2, 0), (4, 3)]], ids=["few", "many"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_group_has_the_product_with_its_expert(
    double_quant: bool, bias: bool, groups: list[tuple[int, int]]
) -> None:
    module = packed(double_quant)
    weights, x = module.packed(), random(sum(rows for _, rows in groups), K).bfloat16()
    biases = module.bias.detach().bfloat16() if bias else None
    y = triton_grouped_linear(x, weights.tensors, weights.quant_format, groups, biases, tile=TILE)
    expected, first = [], 0
    for e, rows in groups:
        own = None if biases is None else biases[e]
        for piece in x[first : first + rows].split(64) if rows else ():
            expected.append(triton_linear(piece, weights.expert(e), own, tile=TILE, splits=1))
        first += rows
    assert_same_bits(y, torch.cat(expected))


def test_no_rows_are_no_launch() -> None:
    weights = packed(True).packed()
    y = triton_grouped_linear(random(0, K).bfloat16(), weights.tensors, weights.quant_format, [], None, tile=TILE)
    assert y.shape == (0, N)
