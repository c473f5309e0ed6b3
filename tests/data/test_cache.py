"""The cache of tokenized datasets holds what reading the rows gives, by whatever way it came there."""

import fcntl
import json
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from datetime import date, datetime, timedelta, tzinfo
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from qsharded.data import (
    Dataset,
    Example,
    Mixture,
    StepLoader,
    Tokenizer,
    cache,
    chunks,
    content,
    fill,
    fill_progress,
    load_examples,
)
from qsharded.data.cache import DataCache
from qsharded.data.facts import facts_of
from qsharded.data.fill import Fill, Interrupted
from qsharded.data.held_out import split_examples
from qsharded.data.load import Reading
from qsharded.data.row_source import Files
from qsharded.data.stored import ExampleFiles, StoredExamples, packed
from qsharded.data.template_options import TemplateOptions
from tests.data import published, templates
from tests.data.folders import chat, make_folder, write_rows
from tests.processes import Command, script

READING = Reading(max_length=60)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(make_folder(tmp_path / "model", template=published.QWEN3))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_BYTES", 2000)
    monkeypatch.setattr(chunks, "_ROWS", 7)


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Conversations, some of them too long, with a reasoning that the template drops; and blank texts."""
    rng = random.Random(seed)
    words = ["fox", "the dog", "2+2", "naïve 👩", "lazy"]
    said = [[" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(4)] for _ in range(count)]
    rows = [{"messages": chat(a, f"<think>x</think>{b}", c, d), "text": None} for a, b, c, d in said]
    return [{"messages": None, "text": " "} if number % 9 == 4 else row for number, row in enumerate(rows)]


def same(dataset: Dataset, expected: Dataset) -> bool:
    """Bytes and counts."""
    equal = [
        np.array_equal(a.ids, b.ids) and np.array_equal(a.trained, b.trained)
        for a, b in zip(dataset.examples, expected.examples, strict=True)
    ]
    return all(equal) and dataset.to_json() == expected.to_json()


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir() and path.name != "files"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.usefixtures("small_chunks")
def test_it_holds_what_reading_the_rows_gives(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    path, rows = tmp_path / name, make_rows(90)
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)
    elif name.endswith("jsonl"):
        write_rows(path, *rows)
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    else:
        path.write_text(json.dumps(rows))
    assert len(list(chunks.chunks([path]))) > 4
    expected = load_examples(path, tokenizer, max_length=60)
    assert min(expected.dropped, expected.empty, len(expected.omitted)) > 0
    assert same(DataCache(tmp_path / "cache", tokenizer, READING).dataset("rows", Files([path])), expected)


def test_a_second_run_reads_no_rows(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *make_rows(20))
    first = DataCache(tmp_path / "cache", tokenizer, READING).dataset("rows", Files([path]))
    monkeypatch.setattr(Fill, "run", lambda self: pytest.fail("the rows are there"))
    other = path.rename(tmp_path / "moved.jsonl")  # it is content that counts
    again = Tokenizer.from_folder(tmp_path / "model")
    assert same(DataCache(tmp_path / "cache", again, READING).dataset("rows", Files([other])), first)


@pytest.mark.parametrize(
    "what",
    [
        "rows", "order", "split", "template", "variables", "tokens", "eos", "length", "train_on", "columns",
        "turn ends", "empty answers", "code", "date",
    ],
)  # fmt: skip
def test_what_decides_the_ids_decides_the_folder(
    tmp_path: Path, tokenizer: Tokenizer, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reading, split, options = tmp_path / "model", Reading(max_length=600), "train", None
    if what == "date":
        tokenizer = Tokenizer.from_folder(make_folder(model, template=templates.LLAMA3))
    paths = [write_rows(tmp_path / f"{name}.jsonl", *make_rows(9, seed)) for seed, name in enumerate("ab")]
    DataCache(tmp_path / "cache", tokenizer, reading).dataset("rows", Files(paths))
    if what == "rows":
        paths[0].write_bytes(paths[0].read_bytes().replace(b"fox", b"fix"))
    elif what == "order":
        paths.reverse()
    elif what == "template":
        make_folder(model, template=published.QWEN3.replace("tool", "tooth"))
    elif what == "tokens":
        make_folder(model, "byte-level-bos", published.QWEN3)
    elif what == "eos":
        (model / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    elif what == "length":
        reading = replace(reading, max_length=601)
    elif what == "train_on":
        reading = replace(reading, train_on="all")
    elif what == "columns":
        reading = replace(reading, columns={"system": "said"})
    elif what == "turn ends":
        reading = replace(reading, train_on_turn_ends=False)
    elif what == "empty answers":
        reading = replace(reading, train_on_empty_answers=True)
    elif what == "split":
        split = "test"
    elif what == "variables":
        options = TemplateOptions(variables={"enable_thinking": False})
    elif what == "code":
        monkeypatch.setattr(cache, "_code", lambda: ["another version"])
    else:
        monkeypatch.setattr("qsharded.data.chat.datetime", Tomorrow)
    again = DataCache(tmp_path / "cache", Tokenizer.from_folder(model, options), reading)
    again.dataset("rows", Files(paths, split))
    assert len(folders(tmp_path / "cache")) == 2


def test_a_date_that_is_set_is_the_same_tomorrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_folder(tmp_path / "model", template=templates.LLAMA3)
    days = [TemplateOptions(today=date(2026, 1, day)) for day in (1, 2)]
    first, other = (Tokenizer.from_folder(model, day).identity() for day in days)
    assert first != other
    monkeypatch.setattr("qsharded.data.chat.datetime", Tomorrow)
    assert Tokenizer.from_folder(model, days[0]).identity() == first


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) + timedelta(days=1)


def test_the_hash_of_a_file_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED_S", -1)
    path = write_rows(tmp_path / "rows.jsonl", {"text": "fox"})
    first = content.content_hash(path, tmp_path / "memory")
    stat = path.stat()
    with monkeypatch.context() as patch:
        patch.setattr(content, "_hash", lambda path: pytest.fail("it is known"))
        assert content.content_hash(path, tmp_path / "memory") == first
    time.sleep(0.02)  # more than a tick of the file system's clock
    write_rows(path, {"text": "dog"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync and tar do
    assert content.content_hash(path, tmp_path / "memory") == content.content_hash(path) != first


def test_a_large_file_is_hashed_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PART", 4)
    texts = (b"", b"abc", b"abcd", b"abcdefghij", b"efghabcdij", b"abcdefghik")
    hashes = []
    for number, text in enumerate(texts):
        (path := tmp_path / str(number)).write_bytes(text)
        hashes.append(content.content_hash(path))
    assert len(set(hashes)) == len(texts)
    assert content.content_hashes([tmp_path / "3", tmp_path / "4"], tmp_path / "memory") == hashes[3:5]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    content.content_hash(write_rows(tmp_path / "rows.jsonl", {"text": "fox"}), tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_of_a_document_the_split_is_held(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    (path := tmp_path / name).write_text(json.dumps({"train": make_rows(90, 1), "test": make_rows(80, 2)}))
    for split in ("train", "test"):
        found = DataCache(tmp_path / "cache", tokenizer, READING).dataset("rows", Files([path], split))
        assert same(found, load_examples(path, tokenizer, split=split, max_length=60))


@pytest.mark.usefixtures("small_chunks")
def test_bad_rows_of_all_chunks_are_counted_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = make_rows(90)
    rows[8::10] = [{"id": 1}, {"messages": chat("a")}, 3] * 3
    path, reading = write_rows(tmp_path / "rows.jsonl", *rows), replace(READING, skip_bad_rows=9)
    found = DataCache(tmp_path / "cache", tokenizer, reading).dataset("rows", Files([path]))
    assert found.bad == len(found.bad_reasons) == 9
    assert same(found, load_examples(path, tokenizer, max_length=60, skip_bad_rows=9))
    said = []
    for skipped in (0, 8):
        reading = replace(READING, skip_bad_rows=skipped)
        with pytest.raises(ValueError, match="9 rows cannot be used:") as refused:
            load_examples(path, tokenizer, **vars(reading))
        with pytest.raises(ValueError, match="9 rows cannot be used:") as again:
            DataCache(tmp_path / "cache", tokenizer, reading).dataset("rows", Files([path]))
        said += [str(refused.value), str(again.value)]
    assert len(set(said)) == 1


@pytest.mark.usefixtures("small_chunks")
def test_where_no_more_bad_rows_are_listed_no_more_are_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict] = make_rows(300)
    rows[8:200:8] = [{"id": 1}] * 24  # a few in a chunk, too few for a chunk to be refused by itself
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    read, tokenized = [], fill._tokenized
    monkeypatch.setattr(fill, "_tokenized", lambda chunk, *how: (read.append(chunk), tokenized(chunk, *how))[1])
    with pytest.raises(ValueError, match=r"^at least 2\d rows cannot be used:\n  .*rows\.jsonl:9: "):
        DataCache(tmp_path / "cache", tokenizer, READING).dataset("rows", Files([path]))
    assert 4 < len(read) < len(list(chunks.chunks([path]))) - 4


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_full_of_bad_rows_hides_none_before_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows: list[dict] = [{"id": 1}, *make_rows(40), *[{}] * 400]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=r"^at least \d+ rows cannot be used:\n  .*rows\.jsonl:1: .*\n  .*:42: "):
        DataCache(tmp_path / "cache", tokenizer, READING).dataset("rows", Files([path]))
    reading = replace(READING, skip_bad_rows=401)
    found = DataCache(tmp_path / "cache", tokenizer, reading).dataset("rows", Files([path]))
    assert (found.bad, len(found.bad_reasons)) == (401, 20)
    assert same(found, load_examples(path, tokenizer, **vars(reading)))


@pytest.mark.usefixtures("small_chunks")
def test_a_column_may_be_in_some_chunks_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows: list[dict] = [{"q": "fox " * 9, "completion": "dog"} for _ in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", *rows, {"p": "lazy", "q": "fox", "completion": "dog", "s": "be"})
    reading = replace(READING, columns={"prompt": "q", "system": "s"})
    found = DataCache(tmp_path / "cache", tokenizer, reading).dataset("rows", Files([path]))
    assert same(found, load_examples(path, tokenizer, **vars(reading)))
    reading = replace(READING, columns={"prompt": "q", "system": "t"})
    with pytest.raises(ValueError, match="--dataset-columns system=t: no row has a column 't'"):
        DataCache(tmp_path / "cache", tokenizer, reading).dataset("rows", Files([path]))


@pytest.mark.usefixtures("small_chunks")
def test_a_bad_row_is_named_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = make_rows(60)
    rows[40], rows[50] = {"messages": chat("a")}, {"messages": []}
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl:41: .*no message of the assistant"):
        DataCache(tmp_path / "cache", tokenizer, READING).dataset("rows", Files([path]))
    assert not folders(tmp_path / "cache")


def test_nothing_to_learn_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": " "})
    with pytest.raises(ValueError, match=r"mine has no tokens to train on: 0 rows .* 1 as empty"):
        DataCache(tmp_path / "cache", tokenizer, READING).dataset("mine", Files([path]))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_fill_is_no_cache_and_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *make_rows(90))
    monkeypatch.setattr(fill_progress, "_NOTE_S", 0.0)
    begun: list[chunks.Chunk] = []
    tokenized = fill._tokenized

    def stops_at_fifth(chunk: chunks.Chunk, *how: object) -> object:
        begun.append(chunk)
        if len(begun) == 5:
            raise Interrupted("killed")
        return tokenized(chunk, *how)

    monkeypatch.setattr(fill, "_tokenized", stops_at_fifth)
    stored = DataCache(tmp_path / "cache", tokenizer, READING)
    with pytest.raises(Interrupted):
        stored.dataset("rows", Files([path]))
    (part,) = folders(tmp_path / "cache")
    assert part.endswith(".part")
    if torn:  # what was written behind the last note
        with (tmp_path / "cache" / part / "tokens.bin").open("ab") as file:
            file.write(b"abcde")
    assert same(stored.dataset("rows", Files([path])), load_examples(path, tokenizer, max_length=60))
    assert len(begun) == len(list(chunks.chunks([path]))) + 1, "the fifth was begun twice, the first four once"
    assert folders(tmp_path / "cache") == {part.removesuffix(".part")}


@pytest.mark.parametrize("damage", ["tokens.bin", "facts.bin", "done.json"])
def test_a_damaged_one_is_made_anew(
    tmp_path: Path, tokenizer: Tokenizer, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *make_rows(20))
    stored = DataCache(tmp_path / "cache", tokenizer, READING)
    stored.dataset("rows", Files([path]))
    (name,) = folders(tmp_path / "cache")
    file = tmp_path / "cache" / name / damage
    file.write_bytes(file.read_bytes()[:-30])
    assert same(stored.dataset("rows", Files([path])), load_examples(path, tokenizer, max_length=60))
    assert "is damaged and made anew" in capsys.readouterr().err


def test_others_wait_for_the_first(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *make_rows(20))
    stored = DataCache(tmp_path / "cache", tokenizer, READING)
    stored.dataset("rows", Files([path]))
    (name,) = folders(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / name)
    run, filled = Fill.run, []
    monkeypatch.setattr(Fill, "run", lambda self: (filled.append(self), run(self)))
    with (tmp_path / "cache" / f"{name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [threading.Thread(target=stored.dataset, args=("rows", Files([path]))) for _ in range(2)]
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        assert not filled
    for thread in waiting:
        thread.join()
    assert len(filled) == 1
    assert "waiting for another process that tokenizes the same rows" in capsys.readouterr().err


def test_processes_that_tokenize_start_fast() -> None:
    code = "import sys, qsharded.data.tokenizing; sys.exit('torch' in sys.modules)"
    assert Command(["-c", code]).end() == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *make_rows(3))
    with pytest.raises(OSError, match=r"the data cache .*rows\.jsonl/c cannot be used: .*; give --data-cache a folder"):
        DataCache(path / "c", tokenizer, READING).dataset("rows", Files([path]))


@pytest.mark.usefixtures("small_chunks")
def test_processes_of_its_own_fill_it_alike(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    rows = make_rows(120)
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    stored = DataCache(tmp_path / "cache", tokenizer, READING)
    found = stored.dataset("rows", Files([path]))
    assert same(found, load_examples(path, tokenizer, max_length=60))
    assert f"tokenizing rows: {len(found.examples)} rows in 00:0" in capfd.readouterr().err
    write_rows(path, *rows[:100], {"messages": []}, *rows, {"messages": []})
    with pytest.raises(ValueError, match=r"rows\.jsonl:101: .*messages is empty"):
        stored.dataset("rows", Files([path]))


def test_when_its_process_is_killed_the_others_leave(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As for torchrun's SIGKILL: nothing can be handed on, and nothing may go on writing."""
    rows = write_rows(tmp_path / "rows.jsonl", *make_rows(2000) * 10)
    command = Command(
        [
            script(
                tmp_path,
                "from pathlib import Path\n"
                "from qsharded.data import Tokenizer\n"
                "from qsharded.data.fill import Fill\n"
                "from qsharded.data.load import Reading\n"
                "from qsharded.data.row_source import Files\n"
                "from qsharded.data.tokenizing import fill_by_processes\n"
                f"folder = Path({str(tmp_path)!r})\n"
                "tokenizer = Tokenizer.from_folder(folder / 'model')\n"
                f"files = [Path({str(rows)!r})] * 200\n"
                "(folder / 'part').mkdir()\n"
                "print('begun', flush=True)\n"
                "reading, part = Reading(max_length=60), folder / 'part'\n"
                "fill_by_processes(Fill('x', Files(files), tokenizer, reading, part, 2, False))\n",
            )
        ],
        PYTHONPATH=os.pathsep.join([str(Path(cache.__file__).parents[2])]),
    )
    tokens = tmp_path / "part" / "tokens.bin"
    deadline = time.monotonic() + 60
    while not (tokens.exists() and tokens.stat().st_size):
        assert time.monotonic() < deadline, command.lines
        time.sleep(0.1)
    assert len(working_on(tmp_path)) >= 4  # the command, the process that it started, and two helpers
    command.signal(signal.SIGKILL)
    while working_on(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def working_on(folder: Path) -> list[str]:
    """The processes that have a file in ``folder`` open or in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_text()
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        if process.name != str(os.getpid()) and any(str(folder) in name for name in [text, *files]):
            found.append(process.name)
    return found


def store(examples: list[Example], folder: Path) -> StoredExamples:
    folder.mkdir()
    with ExampleFiles(folder) as files:
        for start in range(0, len(examples), 7):
            files.add(packed(examples[start : start + 7]))
    return StoredExamples(folder, len(examples))


def examples_of(count: int, seed: int = 3) -> list[Example]:
    rng = random.Random(seed)
    lengths = [rng.randint(2, 30) for _ in range(count)]
    return [
        Example([rng.randrange(2**31) for _ in range(n)], [*(rng.random() < 0.5 for _ in range(n - 1)), True])
        for n in lengths
    ]


def test_stored_examples_are_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsharded.data.stored._MAPPED_BYTES", 3 * 4096)  # pages are let go in between
    expected = [*examples_of(40), Example([0, 2**31 - 1], [True, False])]
    stored = store(expected, tmp_path / "stored")
    assert same(Dataset(stored), Dataset(expected))
    assert stored[-1].ids.tolist() == [0, 2**31 - 1]
    assert [len(example) for example in stored[3:9:2]] == [len(example) for example in expected[3:9:2]]
    assert (facts_of(stored) == facts_of(expected)).all()
    with pytest.raises(IndexError):
        stored[41]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("weights", [None, [2, 1]])
def test_batches_are_those_of_examples_in_memory(tmp_path: Path, packing: bool, weights: list[int] | None) -> None:
    """Of a mixture, one part of it in memory, with rows held out."""
    parts = [examples_of(50, 1), examples_of(20, 2)]
    stored = [store(parts[0], tmp_path / "a"), parts[1]]
    batches = []
    for examples in (parts, stored):
        mixed = Mixture({name: Dataset(part) for name, part in zip("ab", examples, strict=True)}, weights)
        train, evaluation = mixed.split(0.2, seed=1)
        loader = StepLoader(
            train.examples,
            max_length=40,
            packing=packing,
            batch_size=2,
            accumulation=2,
            rank=1,
            world_size=2,
            seed=5,
            pad_id=0,
            draw=train.draw(5),
        )
        steps = list(islice(loader.steps(), 12))
        assert steps[-1].cursor.epoch
        batches.append(
            [
                [(step.trained_tokens, step.tokens, step.groups, step.cursor) for step in steps],
                [b.input_ids.tolist() + b.targets.tolist() for step in steps for b in step.micro_batches],
                [example.ids.tolist() for example in evaluation.examples],
            ]
        )
    assert batches[0] == batches[1]


def test_rows_are_held_out_alike(tmp_path: Path) -> None:
    examples = examples_of(30)
    stored = store(examples, tmp_path / "stored")
    halves = zip(split_examples(Dataset(examples), 0.3, 1), split_examples(Dataset(stored), 0.3, 1), strict=True)
    for expected, found in halves:
        assert same(found, expected)
