"""Training on a dataset while it is tokenized."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qsharded.data import Tokenizer, cache, growing
from qsharded.data.ahead import one_ahead
from qsharded.data.cache import DataCache
from qsharded.data.chunks import Chunk, chunks_of
from qsharded.data.fill import Fill
from qsharded.data.fill_progress import Enough
from qsharded.data.growing import Growing
from qsharded.data.load import Reading
from qsharded.data.loader import Cursor, Step, StepLoader
from qsharded.data.mixture import Mixture
from qsharded.data.streams import Streams
from qsharded.data.window_loader import WindowLoader
from tests.data.folders import make_folder

WINDOW, STEP = 8, 4


@dataclass
class Stream:
    """Rows of which the second and each later window is there when it is let through.

    Attributes:
        let: an event for each window.
    """

    rows: list[dict[str, Any]]
    let: list[threading.Event]
    asked: list[int] = field(default_factory=list)
    nbytes: int = 0

    def identity(self, memory: Path) -> list[Any]:
        return [self.rows]

    def chunks(self) -> Iterator[Chunk]:
        for number, at in enumerate(range(0, len(self.rows), WINDOW)):
            self.asked.append(number)
            assert self.let[number].wait(30)
            yield from chunks_of(iter([(f"s:{at + n}", row) for n, row in enumerate(self.rows[at : at + WINDOW])]))


def stream_of(windows: int, *, free: int = 0, word: str = "fox", less: int = 0) -> Stream:
    let = [threading.Event() for _ in range(windows)]
    for event in let[:free]:
        event.set()
    return Stream([{"text": f"{word} {n}"} for n in range(windows * WINDOW - less)], let)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "WINDOW", WINDOW)
    monkeypatch.setattr(cache, "WINDOW", WINDOW)
    monkeypatch.setattr(growing, "_POLL_S", 0.001)
    monkeypatch.setattr(cache, "fill_by_processes", run_here)


def run_here(fill: Fill) -> None:
    """What the process does that tokenizes, in this one."""
    Fill(**vars(fill) | {"workers": 1, "shows_progress": False}).run()


@pytest.fixture
def data_cache(tmp_path: Path) -> DataCache:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model"))
    return DataCache(tmp_path / "cache", tokenizer, Reading(max_length=64), enough=Enough(10**6, 0))


def loader_of(mixture: Mixture, rank: int = 0, ranks: int = 1) -> StepLoader:
    return StepLoader(
        mixture.examples,
        max_length=64,
        packing=False,
        batch_size=STEP // ranks,
        accumulation=1,
        rank=rank,
        world_size=ranks,
        seed=3,
        pad_id=0,
        draw=mixture.draw(3),
    )


def loader(streams: Streams, rank: int = 0, ranks: int = 1) -> WindowLoader:
    return WindowLoader(lambda number: loader_of(streams.window(number), rank, ranks))


def ids(step: Step) -> list[list[int]]:
    return sorted([token for token in row.tolist() if token] for batch in step.micro_batches for row in batch.input_ids)


def all_ids(data_cache: DataCache, stream: Stream) -> list[list[int]]:
    rows = ((f"s:{n}", row) for n, row in enumerate(stream.rows))
    return [example.ids.tolist() for example in data_cache.reading.examples(rows, data_cache.tokenizer).examples]


def test_steps_are_taken_while_later_rows_are_tokenized(data_cache: DataCache) -> None:
    stream = stream_of(3, free=1)
    streams = Streams({"s": data_cache.start("s", stream)})
    steps = one_ahead(loader(streams).steps())
    first = next(steps)  # the second window is not let through: its rows cannot be tokenized yet
    assert {tuple(row) for row in ids(first)} <= {tuple(row) for row in all_ids(data_cache, stream)[:WINDOW]}
    assert not streams.parts["s"].kept.exists()
    stream.let[1].set()
    while 2 not in stream.asked:  # that is tokenized, though no further step was asked for
        threading.Event().wait(0.001)
    stream.let[2].set()
    taken = [first, *islice(steps, 5)]
    steps.close()
    assert sorted(row for step in taken for row in ids(step)) == sorted(all_ids(data_cache, stream))


def test_windows_follow_each_other_and_begin_again(data_cache: DataCache) -> None:
    stream = stream_of(3, free=3, less=STEP)
    streams = Streams({"s": data_cache.start("s", stream)})
    taken = [ids(step) for step in islice(loader(streams).steps(), 7)]
    whole = all_ids(data_cache, stream)
    for at, rows in ((0, whole[:WINDOW]), (2, whole[WINDOW : 2 * WINDOW]), (5, whole[:WINDOW])):
        assert sorted(taken[at] + taken[at + 1]) == sorted(rows)
    assert taken[4] == sorted(whole[2 * WINDOW :])
    assert taken[5:] != taken[:2], "each pass is in an order of its own"


@pytest.mark.parametrize("size", [3, 5, 12])
def test_a_step_that_a_window_is_too_short_for_goes_on_in_the_next(data_cache: DataCache, size: int) -> None:
    stream = stream_of(3, free=3)
    streams = Streams({"s": data_cache.start("s", stream)})
    whole = WindowLoader(lambda number: replace(loader_of(streams.window(number)), batch_size=size))
    taken = [*islice(whole.steps(), 2 * 3 * WINDOW // size)]
    assert {len(ids(step)) for step in taken} == {size}
    rows = [row for step in taken for row in ids(step)]
    counts = Counter(map(tuple, rows))
    assert counts.keys() == set(map(tuple, all_ids(data_cache, stream)))
    assert max(counts.values()) <= 2
    for at in range(1, len(taken)):
        assert ids(next(whole.steps(taken[at - 1].cursor))) == ids(taken[at])


@pytest.mark.parametrize("weights", [None, [0.25, 0.75]])
def test_a_run_that_goes_on_has_the_steps_that_were_to_come_on_any_ranks(
    data_cache: DataCache, weights: list[float] | None
) -> None:
    parts = {
        word: data_cache.start(word, stream_of(3, free=3, word=word, less=less))
        for word, less in (("fox", 0), ("dog", WINDOW))
    }
    streams = Streams(parts, weights)
    whole = [*islice(loader(streams).steps(), 8)]
    again = [*islice(loader(streams).steps(whole[2].cursor), 5)]
    assert [ids(step) for step in again] == [ids(step) for step in whole[3:]]
    by_rank = [[*islice(loader(streams, rank, 2).steps(Cursor()), 8)] for rank in (0, 1)]
    for step, *shares in zip(whole, *by_rank, strict=True):
        assert sorted(row for share in shares for row in ids(share)) == ids(step)


def test_what_is_held_out_of_the_first_window_is_never_trained_on(data_cache: DataCache) -> None:
    stream = stream_of(2, free=2)
    streams = Streams({"s": data_cache.start("s", stream)}, held_out=0.25, seed=1)
    held_out = {tuple(example.ids.tolist()) for example in streams.evaluation().examples}
    assert len(held_out) == 2
    seen = [{tuple(row) for row in ids(step)} for step in islice(loader(streams).steps(), 8)]
    assert not held_out & set().union(*seen)
    assert len(set().union(*seen)) == 2 * WINDOW - 2


def test_a_bad_row_stops_the_run_when_its_window_comes(data_cache: DataCache) -> None:
    stream = stream_of(3, free=1)
    stream.rows[WINDOW + 1] = {"id": 3}
    streams = Streams({"s": data_cache.start("s", stream)})
    steps = loader(streams).steps()
    assert len([*islice(steps, 2)]) == 2
    stream.let[1].set()
    with pytest.raises(ValueError, match=r"^s:9: the fields fit no known format"):
        next(steps)
    with pytest.raises(ValueError, match=r"^s:9: "):
        streams.window(0)
    assert streams.notes(False)[0].startswith("warning: s:9: ")
    other = data_cache.start("s", stream_of(1, free=1))  # another dataset is not affected
    assert len(other.window(0).rows.examples) == WINDOW


def test_a_later_run_begins_with_what_is_there(data_cache: DataCache, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(2, free=1)
    first = data_cache.start("s", stream)
    assert len(first.window(0).rows.examples) == WINDOW
    left = Growing("s", first.kept)  # as another process of the node has it
    assert len(left.window(0).rows.examples) == WINDOW
    stream.let[1].set()
    assert len(left.window(1).rows.examples) == WINDOW
    while not first.kept.exists():
        threading.Event().wait(0.001)
    monkeypatch.setattr(cache, "fill_by_processes", lambda fill: pytest.fail("it is complete"))
    assert len(data_cache.start("s", stream).window(1).rows.examples) == WINDOW


def test_what_is_told_counts_all_rows_so_far(data_cache: DataCache) -> None:
    stream = stream_of(2, free=2)
    stream.rows[-1] = {"prompt": "a", "completion": ""}
    streams = Streams({"s": data_cache.start("s", stream)})
    assert streams.window(1)
    assert [note.startswith("s: note: 1 row with empty answers") for note in streams.notes(False)] == [True]
    assert json.dumps(streams.notes(False))
