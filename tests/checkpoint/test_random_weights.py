"""Random weights are the same however their rows are asked for, in one piece or many, by one rank or several."""

from pathlib import Path

import pytest
import torch

from qsharded.checkpoint import load_model
from qsharded.checkpoint.random_weights import RandomWeights
from tests.checkpoints import write_checkpoint


def test_random_weights_do_not_depend_on_how_rows_are_asked_for() -> None:
    source = RandomWeights(seed=3, std=0.02, device=torch.device("cpu"), shapes={})
    source.check({"w": (2500, 8), "model.norm.weight": (16,), "q_proj.bias": (4,)})
    whole = source.rows("w", 0, 2500)
    parts = [source.rows("w", start, min(start + 700, 2500)) for start in range(0, 2500, 700)]
    assert torch.equal(torch.cat(parts), whole)
    assert 0.019 < whole.float().std() < 0.021
    assert source.rows("w", 2500, 2500).shape == (0, 8)
    assert torch.equal(source.rows("model.norm.weight", 0, 16).float(), torch.ones(16))
    assert torch.equal(source.rows("q_proj.bias", 0, 4).float(), torch.zeros(4))


def test_the_size_of_a_piece_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path)
    expected = load_model(folder, dtype=torch.bfloat16, random_init=True).state_dict()
    monkeypatch.setattr(RandomWeights, "rows_at_once", lambda self, row_bytes: 7)
    for name, found in load_model(folder, dtype=torch.bfloat16, random_init=True).state_dict().items():
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected[name]))), name


def test_no_more_than_a_run_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, intermediate_size=2112)
    rows, asked = RandomWeights.rows, []

    def watch(self: RandomWeights, name: str, start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return rows(self, name, start, stop)

    monkeypatch.setattr(RandomWeights, "rows", watch)
    load_model(folder, dtype=torch.bfloat16, random_init=True)
    assert {(0, 1024), (1024, 2048), (2048, 2112)} <= set(asked)
    assert max(stop - start for start, stop in asked) == 1024
