"""Types of files that `datasets` reads, and configurations, give the rows that JSON Lines of them give."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from qsharded.data import Tokenizer, load_examples, read_rows
from qsharded.data.cache import DataCache
from qsharded.data.load import Reading
from qsharded.data.row_source import Configured, row_source
from qsharded.data.sources import configuration_of, find_files
from tests.data import published
from tests.data.folders import chat, make_folder, write_rows

pytest.importorskip("datasets")

ROWS = [{"prompt": f'p {n} "x",\n\ty', "completion": f"é {n}"} for n in range(7)]


def delimited(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


WRITTEN = {
    "a.csv": delimited(ROWS, ","),
    "a.tsv": delimited(ROWS, "\t"),
    "a.csv.gz": gzip.compress(delimited(ROWS, ",")),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.jsonl.bz2": bz2.compress(lines(ROWS)),
    "a.jsonl.xz": lzma.compress(lines(ROWS)),
    "A.ARROW": arrow(ROWS),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRITTEN[name])
    assert [*read_rows(path)] == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, 1)]
    assert [row for _, row in read_rows(tmp_path)] == ROWS


def test_zstandard_is_read_or_named(tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "a.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines(ROWS))
    if importlib.util.find_spec("zstandard"):
        assert [row for _, row in read_rows(path)] == ROWS
    else:
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst: datasets cannot read it: .*pip install zstandard"):
            [*read_rows(path)]


def test_messages_have_the_fields_that_were_written_alone(tmp_path: Path) -> None:
    """Arrow gives each message every field that one of them has."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines([row])))
    assert [row for _, row in read_rows(tmp_path / "a.jsonl.gz")] == [row]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"a,b\n')
    with pytest.raises(ValueError, match=r"a\.csv: datasets cannot read it: .*EOF inside string"):
        [*read_rows(tmp_path / "a.csv")]


def test_a_folder_of_rows_may_have_tables_beside_them(tmp_path: Path) -> None:
    (tmp_path / "statistics.csv").write_bytes(WRITTEN["a.csv"])
    write_rows(tmp_path / "train.jsonl", {"text": "a"})
    assert find_files(tmp_path, "train") == [tmp_path / "train.jsonl"]


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A folder as a dataset's repository on the Hub is, with two configurations."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for number, name in enumerate(("one", "two-train", "two-test")):
        (folder / f"{name}.csv").write_bytes(delimited(ROWS[number : number + 3], ","))
    described = [{"split": split, "path": f"two-{split}.csv"} for split in ("train", "test")]
    configurations = [{"config_name": "one", "data_files": "one.csv"}, {"config_name": "two", "data_files": described}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configurations)}\n---\n")
    return folder


@pytest.mark.parametrize(
    ("configuration", "split", "first"), [("one", "train", 0), ("two", "train", 1), ("two", "test", 2)]
)
def test_configurations_and_splits(described: Path, configuration: str, split: str, first: int) -> None:
    source = f"{described}:{configuration}"
    assert [row for _, row in read_rows(source, split=split)] == ROWS[first : first + 3]


@pytest.mark.parametrize(
    ("configuration", "split", "reason"), [("three", "train", "Available: .*one.*two"), ("two", "dev", "train.*test")]
)
def test_what_there_is_is_said(described: Path, configuration: str, split: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"repository:{configuration}: datasets cannot read it: .*{reason}"):
        [*read_rows(f"{described}:{configuration}", split=split)]


def test_names_with_configurations(tmp_path: Path) -> None:
    assert configuration_of("owner/name:main-1.0") == ("owner/name", "main-1.0")
    assert configuration_of(f"{tmp_path}:x") == (str(tmp_path), "x")
    file = write_rows(tmp_path / "rows.jsonl:x", {})
    assert [configuration_of(name) for name in (str(file), "owner/name", "C:x", "owner/rows.jsonl:x")] == [None] * 4


def test_the_cache_takes_them(described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=published.QWEN3))
    cache = DataCache(tmp_path / "cache", tokenizer, Reading(max_length=200), shows_progress=False)
    monkeypatch.setattr("qsharded.data.cache.fill_by_processes", lambda fill: fill.run())
    source = row_source(f"{described}:two", "test")
    assert source == Configured(str(described), "two", "test")
    found = cache.dataset("rows", source)
    expected = load_examples(f"{described}:two", tokenizer, max_length=200, split="test").examples
    assert [example.ids.tolist() for example in found.examples] == [example.ids.tolist() for example in expected]
    (described / "two-test.csv").write_bytes(delimited(ROWS[:1], ","))
    assert len(cache.dataset("rows", source).examples) == 1


def test_a_chat_in_an_arrow_file_trains_as_in_json_lines(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=published.QWEN3))
    rows = [{"messages": chat("a", "b", "c", "d")}]
    (tmp_path / "a.arrow").write_bytes(arrow(rows))
    write_rows(tmp_path / "a.jsonl", *rows)
    one, other = (load_examples(tmp_path / f"a.{kind}", tokenizer, max_length=99) for kind in ("arrow", "jsonl"))
    assert one.examples[0].ids.tolist() == other.examples[0].ids.tolist()
    assert one.examples[0].trained.tolist() == other.examples[0].trained.tolist()
