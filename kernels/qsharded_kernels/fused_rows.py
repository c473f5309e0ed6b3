"""Up to how many rows of x the fused product beats decoding W first and then multiplying: what a benchmark found.

``python -m benchmarks.kernels.fused_rows`` writes ``fused_rows.json``. For a card, its ``most_rows`` maps the log2 of a
number of weights N*K, rounded down, to the most rows; a figure holds up to the next.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("fused_rows.json")

MostRows = dict[int, int]

# Where nothing like the card was measured: a few rows, which leave the matrix units idle whatever the kernel does.
UNKNOWN_CARD: MostRows = {0: 32}


@cache
def most_rows(N: int, K: int, device: torch.device) -> int:
    """For a weight [N, K] on a CUDA device, by its name, else by its compute capability."""
    return for_size(for_card(torch.cuda.get_device_name(device), capability(device)), N * K)


def capability(device: torch.device) -> str:
    """Such as "9.0"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def for_card(name: str, capability: str) -> MostRows:
    """The figures of the card of that name, else of one of its capability, else ``UNKNOWN_CARD``."""
    card = alike(read(), name, capability)
    return UNKNOWN_CARD if card is None else by_size(card["most_rows"])


def alike(cards: list[dict[str, Any]], name: str, capability: str) -> dict[str, Any] | None:
    """The card of that name, else one of its capability, else None."""
    found = [card for card in cards if card["gpu"] == name] or [c for c in cards if c["capability"] == capability]
    return found[0] if found else None


def by_size(most: dict[str, int]) -> MostRows:
    """As JSON has it, whose keys are strings."""
    return {int(size): rows for size, rows in most.items()}


def for_size(most: MostRows, weights: int) -> int:
    """The figure that holds for so many weights; fewer than any that was measured take the first."""
    size = weights.bit_length() - 1
    return most[max((start for start in most if start <= size), default=min(most))]


def read() -> list[dict[str, Any]]:
    """The cards that were measured."""
    return json.loads(PATH.read_text())["cards"]
