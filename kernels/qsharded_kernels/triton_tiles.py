"""Tiles of the products in Triton, by card, size and rows of x: what a benchmark found.

``python -m benchmarks.kernels.tune_triton`` writes ``triton_tiles.json``, a card's entries from the least number of
weights and rows of x on. Where a product was measured on no card alike it has the default, which takes less than the
99 KB of shared memory that a thread block may have on compute capability 8.6, 8.9 and 12.0.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .fused_rows import MostRows, alike, by_size, capability, for_size

PATH = Path(__file__).with_name("triton_tiles.json")


@dataclass(frozen=True)
class LinearTile:
    """How a program of x W^T computes.

    Attributes:
        rows: of W, that a program has; a multiple of 16 for each warp.
        warps: of a program.
        stages: turns of the loop whose codes and x are under way or in use; 1 loads to registers, without a pipeline.
        programs_per_sm: K is cut into as many parts as make so many programs for each SM.
        decoder: one of ``triton_decode.DECODERS``.
    """

    rows: int = 64
    warps: int = 4
    stages: int = 2
    programs_per_sm: int = 6
    decoder: str = "permute"


@dataclass(frozen=True)
class InputGradTile:
    """How a program of dy W computes.

    Attributes:
        rows: of W, in a turn of the loop.
        blocks: of 64 columns, that a program has.
        warps, stages, programs_per_sm: as in :class:`LinearTile`; it is N that is cut.
    """

    rows: int = 32
    blocks: int = 4
    warps: int = 4
    stages: int = 2
    programs_per_sm: int = 6


DEFAULT = LinearTile()
UNKNOWN_CARD: MostRows = {0: 0, 22: 16}  # a smaller weight is multiplied in less time than two launches take


@cache
def linear_tile(N: int, K: int, M: int, device: torch.device) -> LinearTile:
    """For ``M`` rows of x on a weight [N, K]."""
    return LinearTile(**_fields("linear", N * K, M, device))


@cache
def input_grad_tile(N: int, K: int, M: int, device: torch.device) -> InputGradTile:
    """For ``M`` rows of dy on a weight [N, K]."""
    return InputGradTile(**_fields("input_grad", N * K, M, device))


def _fields(product: str, weights: int, M: int, device: torch.device) -> dict[str, Any]:
    """Of the measured tile; none, which makes the default, where that product was not measured on such a card."""
    card = _card(device)
    entries = [] if card is None else card[product]
    return entry(entries, weights, M)["tile"] if entries else {}


def entry(entries: list[dict[str, Any]], weights: int, M: int) -> dict[str, Any]:
    """Of the size nearest below, or the least there is: the first that was measured for so many rows, or the most that
    was."""
    sizes = {entry["log2_weights"] for entry in entries}
    size = max((size for size in sizes if size < weights.bit_length()), default=min(sizes))
    of_size = sorted((entry for entry in entries if entry["log2_weights"] == size), key=lambda entry: entry["M"])
    return next((entry for entry in of_size if entry["M"] >= M), of_size[-1])


@cache
def most_rows(N: int, K: int, device: torch.device) -> int:
    """Up to how many rows of x the product beats decoding first."""
    card = _card(device)
    return for_size(UNKNOWN_CARD if card is None else {0: UNKNOWN_CARD[0]} | by_size(card["most_rows"]), N * K)


def _card(device: torch.device) -> dict[str, Any] | None:
    return alike(read(), torch.cuda.get_device_name(device), capability(device)) if device.type == "cuda" else None


def read() -> list[dict[str, Any]]:
    """The cards that were measured."""
    return json.loads(PATH.read_text())["cards"]
