"""Rows of a dataset, each with the place that it came from."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from qsharded.data.nulls import without_nulls
from qsharded.data.row_limits import numbered_lines, parse_line, parse_row
from qsharded.data.sources import configuration_of, find_files, suffix_of
from qsharded.data.through_datasets import configured_rows, file_rows

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]

_DECODER = json.JSONDecoder()
_GAP = re.compile(r"[ \t\r\n]*[,:]?[ \t\r\n]*")  # what stands between two values of a JSON document


def read_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Each row of a dataset with its origin, ``file:line`` (of a parquet file: ``file:row``, from 1).

    Args:
        source: a .jsonl file (one object a line), a .json file (a list of objects, or ``{"data": [...]}``), a .parquet
            file, another type that `datasets` reads, a folder of such files, a Hub dataset id, or a configuration of
            one; see :func:`qsharded.data.sources.find_files` and :func:`qsharded.data.sources.configuration_of`.
        split: which files to take from a folder or the Hub.

    Raises:
        ValueError: no such source or split, a parquet file without pyarrow to read it, or a malformed row; the message
            starts with the row's origin.
    """
    if (named := configuration_of(source)) is not None:
        yield from configured_rows(*named, split)
        return
    for path in find_files(source, split):
        yield from read_file(path)


def read_file(path: Path) -> Rows:
    """The rows of one file, as :func:`read_rows` gives them."""
    check_not_empty(path)
    readers = {".jsonl": json_lines, ".json": _json_document, ".parquet": parquet_rows}
    return readers.get(suffix_of(path.name), file_rows)(path)


def check_not_empty(path: Path) -> None:
    """Raise ValueError if the file has no byte."""
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty: it was not written, or not downloaded, to its end")


def json_lines(path: Path, start: int = 0, end: int | None = None, first: int = 1) -> Rows:
    """The rows of a file of JSON Lines, or of its bytes from ``start`` to ``end``, which begin with line ``first``."""
    with path.open("rb") as lines:
        lines.seek(start)
        for number, line in numbered_lines(lines, first):
            if line.strip():
                yield _row(f"{path}:{number}", _parsed(line, f"{path}:{number}"))
            if end is not None and lines.tell() >= end:
                return


def _parsed(line: bytes, origin: str) -> Any:
    try:
        return parse_line(line)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _row(origin: str, value: Any) -> tuple[str, Row]:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: a row must be a JSON object, got {type(value).__name__}")
    return origin, value


def _json_document(path: Path) -> Rows:
    if _is_really_json_lines(path):
        yield from json_lines(path)
        return
    text = _document_text(path)
    line, counted = 1, 0
    for at, value in _elements(text, path):
        line, counted = line + text.count("\n", counted, at), at
        yield _row(f"{path}:{line}", value)


def _is_really_json_lines(path: Path) -> bool:
    """Whether the first line is an object in itself and no wrapper: many .json files on the Hub are JSON Lines."""
    with path.open("rb") as lines:
        first = next((line for _, line in numbered_lines(lines) if line.strip()), b"")
    try:
        value = parse_line(first)
    except ValueError:
        return False
    return isinstance(value, dict) and not isinstance(value.get("data"), list)


def _document_text(path: Path) -> str:
    """The text of a valid JSON document."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        parse_row(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return text


def _elements(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(position, value) of each element of the list of rows; the document is known to be valid."""
    at = _skip(text, 0)
    if text[at] == "{":
        at = _find_data(text, at)
    if text[at] != "[":
        raise ValueError(f'{path}: must hold a list of rows, or {{"data": [...]}}')
    at = _skip(text, at + 1)
    while text[at] != "]":
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)


def _find_data(text: str, at: int) -> int:
    """Where the value of the object's key "data" begins, or where the object ends."""
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, end = _DECODER.raw_decode(text, at)
        at = _skip(text, end)
        if key == "data":
            return at
        at = _skip(text, _DECODER.raw_decode(text, at)[1])
    return at


def _skip(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    assert gap is not None, "the pattern matches the empty string"
    return gap.end()


def row_groups(path: Path) -> list[int]:
    """How many rows each row group of a parquet file has.

    Raises:
        ValueError: as :func:`read_rows`.
    """
    with _parquet_errors(path) as parquet:
        metadata = parquet.ParquetFile(path).metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def parquet_rows(path: Path, groups: Sequence[int] | None = None, number: int = 1) -> Rows:
    """The rows of a parquet file, or of some of its row groups, the first of them row ``number``."""
    numbers = count(number)
    with _parquet_errors(path) as parquet:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024, row_groups=groups):
            for row in batch.to_pylist():
                yield f"{path}:{next(numbers)}", without_nulls(row)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[Any]:
    """pyarrow.parquet, whose errors are said in our words."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        yield parquet
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError that names no file
        raise ValueError(f"{path}: not readable as parquet: {error}") from None
