"""The generation benchmark runs through on a small model; without a GPU its CUDA graphs are reported as missing."""

import pytest
import torch

from benchmarks.generation import NATIVE, VARIANTS, measure, ratios
from qsharded.models import decoding
from tests.checkpoints import LLAMA
from tests.models.graph_replays import recorded


def test_every_variant_generates() -> None:
    variants = [*VARIANTS, NATIVE]
    rows = list(measure(LLAMA, torch.device("cpu"), (1, 2), 2, ["generate", "graph"], variants))
    assert sorted(row["variant"] for row in rows) == sorted(variants * 4)
    generated = [row for row in rows if row["way"] == "generate"]
    assert all(row["tokens_per_second"] > 0 for row in generated)


def test_replayed_steps_of_the_native_model_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    monkeypatch.setattr(decoding, "_captures_on", lambda model: True)
    monkeypatch.setattr(decoding, "captured", lambda step: captures.append(1) or recorded(step))
    (row,) = measure(LLAMA, torch.device("cpu"), (2,), 3, ["graph"], [NATIVE])
    assert row["tokens_per_second"] > 0
    assert len(captures) == 3  # a round each


def test_ratios_are_over_bitsandbytes_and_skip_what_failed() -> None:
    rows = [
        {"variant": "bitsandbytes", "batch": 1, "way": "a", "tokens_per_second": 20.0},
        {"variant": "NF4Linear", "batch": 1, "way": "a", "tokens_per_second": 50.0},
        {"variant": "bitsandbytes", "batch": 8, "way": "a", "error": "no"},
        {"variant": "NF4Linear", "batch": 8, "way": "a", "tokens_per_second": 9.0},
    ]
    assert ratios(rows) == [{"variant": "NF4Linear", "batch": 1, "way": "a", "ratio": 2.5}]
