"""The table of rows that the fused product takes."""

import json
from pathlib import Path

import pytest

from qsharded_kernels import fused_rows

CARDS = [
    {"gpu": "A", "capability": "9.0", "most_rows": {"22": 16, "26": 64, "27": 128}},
    {"gpu": "B", "capability": "8.0", "most_rows": {"20": 8}},
]


@pytest.fixture
def _two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rows, "PATH", tmp_path / "table.json")
    fused_rows.PATH.write_text(json.dumps({"cards": CARDS}))


@pytest.mark.usefixtures("_two_cards")
@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("B", "9.0", {20: 8}),  # the name comes first
        ("A, another version", "9.0", {22: 16, 26: 64, 27: 128}),
        ("C", "12.0", fused_rows.UNKNOWN_CARD),
    ],
)
def test_a_card_is_found_by_name_then_by_capability(name: str, capability: str, expected: dict[int, int]) -> None:
    assert fused_rows.for_card(name, capability) == expected


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(1, 16), (2**22, 16), (2**26 - 1, 16), (2**26, 64), (2**27 - 1, 64), (2**27, 128), (2**33, 128)],
)
def test_a_figure_holds_up_to_the_next(weights: int, expected: int) -> None:
    assert fused_rows.for_size({22: 16, 26: 64, 27: 128}, weights) == expected


def test_the_table_that_is_shipped_can_be_read() -> None:
    for card in fused_rows.read():
        most = fused_rows.for_card(card["gpu"], card["capability"])
        assert most
        assert all(0 <= rows <= 4096 for rows in most.values())
