"""From what ``tune_triton`` timed to the tables that the kernels read, ``qsharded_kernels/triton_tiles.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.measure import Row
from benchmarks.kernels.triton_cases import DEQUANTIZED, Tile
from benchmarks.record import command, environment
from qsharded_kernels import fused_rows, triton_tiles


def card(rows: list[Row], tiles: Mapping[str, Tile]) -> dict[str, Any]:
    """The entries of both products, and up to how many rows of x the forward wins over decoding first."""
    return {
        "most_rows": _most_rows([row for row in rows if row.op == "linear"], tiles),
        "linear": _entries([row for row in rows if row.op == "linear"], tiles),
        "input_grad": _entries([row for row in rows if row.op == "input_grad"], tiles),
    }


def _entries(rows: list[Row], tiles: Mapping[str, Tile]) -> list[dict[str, Any]]:
    """The fastest tile for each size and number of rows."""
    return [
        {"log2_weights": size, "M": M, "tile": asdict(tiles[best.contender])}
        for (size, M), group in _groups(rows).items()
        if (best := _fastest(group, tiles)) is not None
    ]


def _most_rows(rows: list[Row], tiles: Mapping[str, Tile]) -> fused_rows.MostRows:
    """By size, the most rows up to which a tile won at every number measured; 0 where at none."""
    found: fused_rows.MostRows = {}
    lost: set[int] = set()
    for (size, M), group in _groups(rows).items():
        found.setdefault(size, 0)
        if size not in lost and _wins(group, tiles):
            found[size] = M
        else:
            lost.add(size)
    return found


def _groups(rows: list[Row]) -> dict[tuple[int, int], list[Row]]:
    """By log2 of the number of weights and rows of x, from the least."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(((row.N * row.K).bit_length() - 1, row.M or 0), []).append(row)
    return dict(sorted(groups.items()))


def _fastest(rows: list[Row], tiles: Mapping[str, Tile]) -> Row | None:
    timed = [row for row in rows if row.times is not None and row.contender in tiles]
    return min(timed, key=_median, default=None)


def _wins(rows: list[Row], tiles: Mapping[str, Tile]) -> bool:
    best = _fastest(rows, tiles)
    others = [_median(row) for row in rows if row.contender == DEQUANTIZED and row.times is not None]
    return best is not None and bool(others) and _median(best) <= min(others)


def _median(row: Row) -> float:
    assert row.times is not None
    return row.times.median


def write(found: dict[str, Any], device: torch.device, module: str) -> Path:
    """This card's tables, in place of older ones of its."""
    made = {key: value for key, value in environment().items() if key in ("gpu", "date", "commit")}
    entry = made | {"capability": fused_rows.capability(device), "command": command(module)} | found
    others = [other for other in triton_tiles.read() if other["gpu"] != entry["gpu"]]
    cards = sorted([*others, entry], key=lambda entry: entry["gpu"])
    triton_tiles.PATH.write_text(json.dumps({"cards": cards}, indent=1) + "\n")
    return triton_tiles.PATH
