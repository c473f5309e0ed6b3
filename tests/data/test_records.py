import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from qsharded.data import read_rows
from qsharded.data.records import find_rows


def test_json_lines_with_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\n  \n{"text": "b"}')
    assert list(read_rows(path)) == [(f"{path}:1", {"text": "é"}), (f"{path}:4", {"text": "b"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "4: not JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "a"} {}', "4: not JSON: Extra data at column 15"),
        (b'{"text": "a}', "4: not JSON: Unterminated string starting at column 10"),
        (b'["a"]', "4: a row must be a JSON object, got list"),
        (b"3", "4: a row must be a JSON object, got int"),
        (b'{"text": "\xff"}', "4: not UTF-8: invalid start byte at byte 10"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="bad") as raised:
        list(read_rows(path))
    assert str(raised.value) == f"{path}:{reason}"


ROWS = [{"text": "a, [b]: {c}"}, {"text": "d", "more": [1, {"data": [2]}]}]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": [1, {"x": "}"}], "data": rows, "end": 0}])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_documents(tmp_path, wrap, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(wrap(ROWS), indent=indent))
    assert [row for _, row in read_rows(path)] == ROWS


def test_rows_of_json_documents_have_line_numbers(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n"data": [\n\n{"text":\n"a"}, {"text": "b"}\n,{"text": "c"}]}')
    assert [origin for origin, _ in read_rows(path)] == [f"{path}:{line}" for line in (4, 5, 6)]


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert list(read_rows(path)) == [(f"{path}:1", {"text": "a"}), (f"{path}:2", {"text": "b"})]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[\n{"text": "a"},\n{"text": }]', ":3: not JSON: Expecting value at column 10"),
        ('[\n{"text": "a"},\n"b"]', ":3: a row must be a JSON object, got str"),
        ('{"rows":\n []}', ': must hold a list of rows, or {"data": [...]}, or {"train": [...]}'),
        ('{"data":\n {}}', ': must hold a list of rows, or {"data": [...]}, or {"train": [...]}'),
        ('"text"', ': must hold a list of rows, or {"data": [...]}, or {"train": [...]}'),
        ("", ": the file is empty: it was not written, or not downloaded, to its end"),
    ],
)
def test_bad_json_documents(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="json") as raised:
        list(read_rows(path))
    assert str(raised.value) == f"{path}{reason}"


@pytest.mark.parametrize("content", ["[]", ' { "data" : [ ] } '])
def test_json_documents_without_rows(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert list(read_rows(path)) == []


def test_parquet_rows_lose_the_nulls_that_arrow_adds(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"id": "c"}]}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": messages}, {"messages": messages[:1]}]), path)
    assert list(read_rows(path)) == [(f"{path}:1", {"messages": messages}), (f"{path}:2", {"messages": messages[:1]})]


def test_parquet_without_pyarrow_tells_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow: pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.parquet: not readable as parquet"):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_folder_gives_its_files_in_name_order(tmp_path):
    (tmp_path / "b.json").write_text('[{"text": "2"}]')
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "3"}\n')
    (tmp_path / "a.jsonl").rename(tmp_path / "a-train.jsonl")
    (tmp_path / "b.json").rename(tmp_path / "b-train.json")
    assert [row["text"] for _, row in read_rows(tmp_path)] == ["1", "2"]
    assert [row["text"] for _, row in read_rows(tmp_path, split="test")] == ["3"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"train": rows, "test": [{"text": "no"}]}])
def test_a_list_of_rows_is_read_under_either_name(tmp_path, name, indent, wrap):
    path = tmp_path / name
    path.write_text("\n " + json.dumps(wrap(ROWS), indent=indent))
    assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize(
    ("split", "text"), [("train", "1"), ("test", "2"), ("eval", "2"), ("validation", "3"), ("dev", "3")]
)
def test_a_document_may_hold_a_list_for_each_split(tmp_path, split, text):
    path = tmp_path / "a.json"
    rows = {name: [{"text": str(number)}] for number, name in enumerate(("train", "test", "val"), 1)}
    path.write_text(json.dumps({"version": "1.0"} | rows))
    assert [row for _, row in read_rows(path, split=split)] == [{"text": text}]


def test_a_split_that_a_document_lacks_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"train": [{"text": "a"}], "dev": [{"text": "b"}]}')
    with pytest.raises(ValueError, match=r"a\.json has no 'test' split; it has train, validation"):
        list(read_rows(path, split="test"))


@pytest.mark.parametrize("row", [{"messages": [{"a": 1}], "train": [1]}, {"train": "yes"}])
def test_a_single_row_is_no_list_of_rows_for_the_name_of_a_field(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert list(read_rows(path)) == [(f"{path}:1", row)]


def test_the_reading_can_go_on_behind_malformed_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\nnope\n3\n{"text": "\xff"}\n{"text": "b"}\n')
    found = [(origin, row if isinstance(row, dict) else str(row)) for origin, row in find_rows(path)]
    assert found == [
        (f"{path}:1", {"text": "a"}),
        (f"{path}:2", "not JSON: Expecting value at column 1"),
        (f"{path}:3", "a row must be a JSON object, got int"),
        (f"{path}:4", "not UTF-8: invalid start byte at byte 10"),
        (f"{path}:5", {"text": "b"}),
    ]
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n 3, {"text": "b"}]')
    assert [str(row) for _, row in find_rows(path)][1] == "a row must be a JSON object, got int"
    assert [origin for origin, _ in find_rows(path)] == [f"{path}:1", f"{path}:2", f"{path}:2"]
