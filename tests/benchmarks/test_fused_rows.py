"""What a run says of the rows that the fused product takes, from times that are made up."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import fused_rows as benchmark
from benchmarks.kernels.measure import Row
from benchmarks.kernels.timing import Times
from qsharded_kernels import fused_rows


def rows(N: int, K: int, speedups: dict[int, float]) -> list[Row]:
    """Measured in any order; the other contender stands beside."""
    times = Times(1, 1, 1)
    return [
        Row("linear", N, K, M, name, 0.0, times, None, 1.0, speedup if name == "fused" else 1.0)
        for M, speedup in reversed(speedups.items())
        for name in ("dequantized", "fused")
    ]


def test_the_last_win_before_the_first_loss_counts() -> None:
    assert benchmark.last_win(rows(64, 64, {1: 2.0, 16: 1.0, 32: 0.9, 64: 1.5})) == 16
    assert benchmark.last_win(rows(64, 64, {1: 0.9, 16: 2.0})) == 0


def test_shapes_of_a_size_share_the_lowest_and_sizes_that_agree_one_entry() -> None:
    wins_to_16, wins_to_32 = {16: 2.0, 32: 0.5}, {16: 2.0, 32: 1.5}
    measured = rows(64, 64, wins_to_32) + rows(65, 64, wins_to_16)  # both 2^12 and some
    measured += rows(128, 64, wins_to_16) + rows(512, 64, wins_to_32)
    assert benchmark.most_rows(measured) == {12: 16, 15: 32}


def test_a_cards_new_figures_replace_its_old_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"gpu": name, "capability": "8.0", "most_rows": {"20": 8}} for name in ("A", "B")]
    monkeypatch.setattr(fused_rows, "PATH", tmp_path / "table.json")
    fused_rows.PATH.write_text(json.dumps({"cards": cards}))
    monkeypatch.setattr(benchmark, "environment", lambda: {"gpu": "A", "date": "today", "commit": "c", "gpus": 1})
    monkeypatch.setattr(fused_rows, "capability", lambda device: "9.0")
    benchmark.write({22: 64}, torch.device("cuda"))
    assert fused_rows.for_card("A", "8.0") == {22: 64}
    assert fused_rows.for_card("B", "8.0") == {20: 8}
    assert [card["gpu"] for card in fused_rows.read()] == ["A", "B"]
