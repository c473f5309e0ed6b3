"""Few tokens sorted by their experts, interpreted where there is no GPU, against PyTorch's sorting."""

import pytest
import torch

from qsharded.quant.routing import Routed
from qsharded_kernels.triton_route import route
from tests.kernels.packed_products import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize(
    ("M", "k", "E", "most"), [(1, 1, 1, 8), (1, 8, 128, 8), (11, 3, 5, 8), (40, 4, 6, 16), (33, 2, 3, 8)]
)
@pytest.mark.parametrize("padded", [True, False])
def test_as_pytorch_sorts(M: int, k: int, E: int, most: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(M)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(M)]).to(DEVICE)
    routed = Routed.of(chosen, E, torch.arange(M, device=DEVICE) % 3 != 1 if padded else None)
    places, counts = route(routed.chosen_Mk.flatten(), E, most), torch.tensor(routed.counts.of_expert)
    R = routed.counts.pairs
    assert places.order_P[:R].tolist() == routed.order_P[:R].tolist()
    assert not places.order_P[R:].any()
    assert places.position_P.tolist() == routed.position_Mk.flatten().tolist()
    assert places.ends_E.tolist() == counts.cumsum(0).tolist()
    rows = {}
    for expert, first, count in places.pieces_Q3.tolist():
        assert count <= most
        for row in range(first, first + count):
            assert rows.setdefault(row, expert) == expert
    assert sorted(rows) == list(range(R))
    assert [rows[row] for row in range(R)] == [e for e, count in enumerate(counts.tolist()) for _ in range(count)]
    assert sum(count for *_, count in places.pieces_Q3.tolist()) == R


def test_all_tokens_to_one_expert_fill_the_room_for_pieces() -> None:
    places = route(torch.full((40,), 2, device=DEVICE), 4, 8)
    assert places.pieces_Q3[:5].tolist() == [[2, first, 8] for first in range(0, 40, 8)]
    assert not places.pieces_Q3[5:].any()
