"""Low-rank updates added in place, interpreted where there is no GPU, against products group by group."""

import pytest
import torch

from qsharded_kernels.triton_grouped_update import add_
from tests.kernels.packed_products import DEVICE, random

COUNTS = [3, 0, 70, 1, 64, 0]  # a group of two pieces, one of a whole piece, and none at the end


@pytest.mark.parametrize(("width", "columns"), [(8, 24), (16, 128), (40, 200)])
@pytest.mark.parametrize("turned", [True, False])
def test_every_group_gets_the_product_with_its_matrix(width: int, columns: int, turned: bool) -> None:
    rows, behind = sum(COUNTS), 5
    y, x = random(rows + behind, columns), random(rows + behind, width)
    shape = (len(COUNTS), columns, width) if turned else (len(COUNTS), width, columns)
    matrices = random(shape[0] * shape[1], shape[2]).view(shape)
    matrices = matrices.transpose(1, 2) if turned else matrices
    expected, first = y.double(), 0
    for matrix, count in zip(matrices.double(), COUNTS, strict=True):
        expected[first : first + count] += x[first : first + count].double() @ matrix
        first += count
    add_(y, x, matrices, torch.tensor(COUNTS, device=DEVICE).cumsum(0).int())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
