"""The generation benchmark runs through on a small model; without a GPU its CUDA graphs are reported as missing."""

import torch

from benchmarks.generation import VARIANTS, measure, ratios
from tests.checkpoints import LLAMA


def test_every_variant_generates() -> None:
    rows = list(measure(LLAMA, torch.device("cpu"), (1, 2), 2))
    assert [row["variant"] for row in rows] == [variant for variant in VARIANTS for _ in range(6)]
    generated = [row for row in rows if row["way"] == "generate"]
    assert all(row["tokens_per_second"] > 0 for row in generated)


def test_ratios_are_over_bitsandbytes_and_skip_what_failed() -> None:
    rows = [
        {"variant": "bitsandbytes", "batch": 1, "way": "a", "tokens_per_second": 20.0},
        {"variant": "NF4Linear", "batch": 1, "way": "a", "tokens_per_second": 50.0},
        {"variant": "bitsandbytes", "batch": 8, "way": "a", "error": "no"},
        {"variant": "NF4Linear", "batch": 8, "way": "a", "tokens_per_second": 9.0},
    ]
    assert ratios(rows) == [{"variant": "NF4Linear", "batch": 1, "way": "a", "ratio": 2.5}]
