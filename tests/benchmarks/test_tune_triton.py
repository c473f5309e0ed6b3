"""The tuner of the products in Triton runs through, interpreted, and the table that it makes can be read."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import triton_table, tune_triton
from benchmarks.kernels.measure import Row
from benchmarks.kernels.timing import Times
from benchmarks.kernels.triton_cases import input_grad_case, linear_case, tile_name
from qsharded_kernels import fused_rows, triton_tiles
from qsharded_kernels.triton_tiles import InputGradTile, LinearTile

FAST, SLOW = LinearTile(32, 2, decoder="gather"), LinearTile(32, 2, decoder="pairs")
GRAD = InputGradTile(16, 1, 1)
TILES = {tile_name(tile): tile for tile in (FAST, SLOW, GRAD)}


def test_it_times_tiles_first_on_the_largest_weight_and_the_best_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_triton, "PROGRAMS", (1, 2))
    tuner = tune_triton.Tuner(torch.device("cpu"), [(32, 128), (32, 64)], 1, float("inf"))
    for make, tiles in ((linear_case, [FAST, SLOW]), (input_grad_case, [GRAD])):
        for rows in tuner.tune(make, tiles, (1, 3), []):
            assert [row.problem for row in rows] == [None] * len(rows)
    # 2 numbers of rows, each tile and two baselines; then 2 weights, 2 numbers, each tile in two cuts and the baselines
    assert len(tuner.rows) == 2 * (2 + 2) + 2 * 2 * (4 + 2) + 2 * (1 + 2) + 2 * 2 * (2 + 2)
    assert tuner.left_out == []


def test_what_would_begin_too_late_is_left_out_and_named() -> None:
    tuner = tune_triton.Tuner(torch.device("cpu"), [(64, 128)], 1, 0.0)
    assert list(tuner.tune(linear_case, [FAST], (1,), [])) == []
    assert tuner.left_out == ["linear_case 64x128 M=1"] * 2


def row(op: str, N: int, M: int, contender: str, median: float | None) -> Row:
    times = None if median is None else Times(median, median, median)
    return Row(op, N, 1024, M, contender, 0.0, times, None, 1.0, None)


@pytest.fixture
def _no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "PATH", tmp_path / "table.json")
    triton_tiles.PATH.write_text(json.dumps({"cards": []}))


@pytest.mark.usefixtures("_no_cards")
def test_the_fastest_tile_and_the_last_win_make_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("input_grad", 1024, 4, tile_name(GRAD), 1.0)]
    for M, fast, slow, dequantized in [
        (1, 5.0, 4.0, 9.0),
        (4, 3.0, 4.0, 9.0),
        (16, 9.5, None, 9.0),
        (32, 1.0, 2.0, 9.0),
    ]:
        times = {tile_name(FAST): fast, tile_name(SLOW): slow, "dequantized": dequantized}
        rows += [row("linear", 1024, M, name, median) for name, median in times.items()]
    monkeypatch.setattr(fused_rows, "capability", lambda device: "9.0")
    triton_table.write(triton_table.card(rows, TILES), torch.device("cpu"), "tune")
    (card,) = triton_tiles.read()
    assert fused_rows.by_size(card["most_rows"]) == {20: 4}
    tiles = [LinearTile(**triton_tiles.entry(card["linear"], 1 << 20, M)["tile"]) for M in (1, 3, 16)]
    assert tiles == [SLOW, FAST, FAST]
    assert InputGradTile(**triton_tiles.entry(card["input_grad"], 1 << 20, 1)["tile"]) == GRAD
