"""The tables of tiles that the products in Triton read."""

import pytest
import torch

from qsharded_kernels import fused_rows, triton_tiles
from qsharded_kernels.triton_decode import DECODERS
from qsharded_kernels.triton_tiles import DEFAULT, InputGradTile, LinearTile, entry

ENTRIES = [{"log2_weights": size, "M": M, "name": f"{size} {M}"} for size in (22, 26) for M in (4, 16)]


@pytest.mark.parametrize(
    ("weights", "M", "expected"),
    [(1, 1, "22 4"), (2**26 - 1, 5, "22 16"), (2**26, 4, "26 4"), (2**30, 16, "26 16"), (2**30, 64, "26 16")],
)
def test_an_entry_holds_up_to_the_next_size_and_down_to_fewer_rows(weights: int, M: int, expected: str) -> None:
    assert entry(ENTRIES, weights, M)["name"] == expected


def test_a_card_of_which_none_alike_was_measured_has_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "_card", lambda device: None)
    device = torch.device("cuda", 7)
    assert triton_tiles.linear_tile(4096, 4096, 1, device) == DEFAULT
    assert triton_tiles.most_rows(4096, 4096, device) == 16
    assert triton_tiles.most_rows(512, 4096, device) == 0


def test_a_card_has_the_default_for_a_product_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"rows": 32, "warps": 2, "stages": 2, "programs_per_sm": 12, "decoder": "permute"}
    card = {"most_rows": {"22": 8}, "linear": [{"log2_weights": 22, "M": 4, "tile": tile}], "input_grad": []}
    monkeypatch.setattr(triton_tiles, "_card", lambda device: card)
    device = torch.device("cuda", 6)
    assert triton_tiles.linear_tile(4096, 4096, 1, device) == LinearTile(**tile)
    assert triton_tiles.input_grad_tile(4096, 4096, 1, device) == InputGradTile()
    assert triton_tiles.most_rows(4096, 4096, device) == 8
    assert triton_tiles.most_rows(512, 4096, device) == 0  # smaller than any that was measured


def test_the_table_that_is_shipped_can_be_read() -> None:
    for card in triton_tiles.read():
        assert fused_rows.by_size(card["most_rows"])
        for found in card["linear"]:
            tile = LinearTile(**found["tile"])
            assert tile.decoder in DECODERS
            assert tile.rows % (16 * tile.warps) == 0
        for found in card["input_grad"]:
            assert InputGradTile(**found["tile"]).rows >= 16
