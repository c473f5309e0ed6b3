"""The data benchmark's own logic, on a few rows and without looking at a clock."""

import json
from pathlib import Path

import pytest

from benchmarks import data, data_rank, data_rows
from qsharded.data import Tokenizer
from qsharded.data.cache import DataCache
from qsharded.data.load import Reading
from qsharded.data.row_source import Files
from qsharded.data.sources import find_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data_rows, "SMALL", 20)
    monkeypatch.setattr(data_rows, "VOCABULARY", 400)
    data_rows.prepare(tmp_path, 60)
    return tmp_path


def test_the_pool_gives_the_ids_that_the_cache_holds(folder: Path) -> None:
    path = folder / "rows" / "3.jsonl"
    _, rows, tokens = data.plain_pool(folder / "model", [path], 2)
    assert rows == 2
    tokenizer = Tokenizer.from_folder(folder / "model")
    stored = DataCache(folder / "cache", tokenizer, Reading(max_length=10**6), shows_progress=False)
    assert tokens == sum(len(example) for example in stored.dataset("rows", Files([path])).examples[:2])


def test_a_cache_of_what_is_there_over_and_over(folder: Path) -> None:
    stored = DataCache(folder / "cache", Tokenizer.from_folder(folder / "model"), Reading(max_length=2048))
    rows = Files(find_files(folder / "rows", "train"))
    ids = [example.ids.tolist() for example in stored.dataset("rows", rows).examples]
    kept = stored.folder / stored._key(rows)
    kept.rename(kept.with_suffix(".part"))
    with data.copied_up_to(folder, 2 * len(ids) + 1):
        assert [example.ids.tolist() for example in stored.dataset("rows", rows).examples] == 3 * ids
    assert not kept.exists()
    assert data.cached(folder) == kept.with_suffix(".part")


def test_a_rank_fills_the_cache_and_starts_on_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_rank, "STEPS", 3)
    for words in (["fill"], ["start", "packing"]):
        monkeypatch.setattr("sys.argv", ["data_rank", str(folder), *words])
        data_rank.main()
    note = data.read_note(data.cached(folder))
    assert note["rows"] + note["dataset"]["dropped"] == 60
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == {"seconds", "cpu", "mb"}


def test_turns_are_found_for_the_figure(folder: Path) -> None:
    assert data.turn_finding(folder, turns=3) > 0


def test_the_pool_goes_on_with_the_next_files(folder: Path) -> None:
    pieces = data.Pieces(folder / "state.json")
    pieces.add_pool(folder, 4)
    pieces.add_pool(folder, 60)
    assert [piece["rows"] for piece in pieces.state["pool"]] == [4, 60]


def test_figures_and_what_they_miss(tmp_path: Path) -> None:
    counted = {"rows": 100, "tokens": 3000}
    pool = [{"seconds": 1.5, "cpu": 3} | counted, {"seconds": 0.5, "cpu": 1} | counted]
    fill = [{"seconds": 2.0, "cpu": 4}, {"seconds": 1.0, "cpu": 1.5}]
    (tmp_path / "state.json").write_text(json.dumps({"pool": pool, "fill": fill, "rows": 250}))
    pieces = data.Pieces(tmp_path / "state.json")
    assert (pieces.filled(250), pieces.filled(251)) == (True, False)
    found = pieces.figures()
    assert (found["tokens a row"], found["first start / plain pool"], found["the same of CPU time"]) == (30, 1.2, 1.1)
    others = dict.fromkeys(data.MUST, 3.0)
    assert data.misses(others | found) == []
    assert data.misses(others | {"second start, s": 3.1, "100 turns, ms": 41}) == [
        *("first start / plain pool", "second start, s", "100 turns, ms")
    ]
