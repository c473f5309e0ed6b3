"""Rows of a dataset, each with the place that it came from."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from qsharded.data.nulls import without_nulls
from qsharded.data.row_limits import not_json, numbered_lines, parse_line, parse_row
from qsharded.data.sources import SPLIT_OF_WORD, configuration_of, find_files, suffix_of
from qsharded.data.through_datasets import configured_rows, file_rows

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
# With what is wrong in the place of a row that is malformed.
FoundRows = Iterator[tuple[str, Row | ValueError]]

_JSON = (".jsonl", ".json")
_DECODER = json.JSONDecoder()
_GAP = re.compile(r"[ \t\r\n]*[,:]?[ \t\r\n]*")  # what stands between two values of a JSON document


def read_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Each row of a dataset with its origin, ``file:line`` (of a parquet file: ``file:row``, from 1).

    Args:
        source: a .jsonl file (one object a line), a .json file (a list of objects, ``{"data": [...]}``, or a list for
            each split, ``{"train": [...]}``), a .parquet file, another type that `datasets` reads, a folder of such
            files, a Hub dataset id, or a configuration of one; see :func:`qsharded.data.sources.find_files` and
            :func:`qsharded.data.sources.configuration_of`. Of .json and .jsonl the content tells which of both it is.
        split: which files to take from a folder or the Hub, and which list of a .json file that has several.

    Raises:
        ValueError: no such source or split, a parquet file without pyarrow to read it, or a malformed row; the message
            starts with the row's origin.
    """
    for origin, row in find_rows(source, split=split):
        if isinstance(row, ValueError):
            raise ValueError(f"{origin}: {row}")
        yield origin, row


def find_rows(source: str | Path, *, split: str = "train") -> FoundRows:
    """As :func:`read_rows`, but malformed rows are given, not raised, so that the reading goes on behind them."""
    if (named := configuration_of(source)) is not None:
        yield from configured_rows(*named, split)
        return
    for path in find_files(source, split):
        yield from find_rows_in(path, split)


def find_rows_in(path: Path, split: str) -> FoundRows:
    """The rows of one file, as :func:`find_rows` gives them."""
    check_not_empty(path)
    if has_lines(path):
        yield from json_lines(path)
    elif suffix_of(path.name) in _JSON:
        yield from _json_document(path, split)
    else:
        yield from (parquet_rows if suffix_of(path.name) == ".parquet" else file_rows)(path)


def check_not_empty(path: Path) -> None:
    """Raise ValueError if the file has no byte."""
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty: it was not written, or not downloaded, to its end")


def has_lines(path: Path) -> bool:
    """Whether the file, which is not empty, is JSON Lines, whatever its name says of the kind of JSON."""
    return suffix_of(path.name) in _JSON and not _is_document(path)


def json_lines(path: Path, start: int = 0, end: int | None = None, first: int = 1) -> FoundRows:
    """The rows of a file of JSON Lines, or of its bytes from ``start`` to ``end``, which begin with line ``first``."""
    with path.open("rb") as lines:
        lines.seek(start)
        for number, line in numbered_lines(lines, first):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)
            if end is not None and lines.tell() >= end:
                return


def _parsed(line: bytes) -> Row | ValueError:
    try:
        return _row(parse_line(line))
    except ValueError as error:
        return error


def _row(value: Any) -> Row | ValueError:
    if not isinstance(value, dict):
        return ValueError(f"a row must be a JSON object, got {type(value).__name__}")
    return value


def _json_document(path: Path, split: str) -> FoundRows:
    text = _document_text(path)
    line, counted = 1, 0
    for at, value in _elements(text, path, split):
        line, counted = line + text.count("\n", counted, at), at
        yield f"{path}:{line}", _row(value)


def _is_document(path: Path) -> bool:
    """Whether the file is one JSON value with the rows in it, whatever its name says: names are often wrong.

    It is unless its first line is a row. A first line that is no JSON decides by the name, for the message's sake.
    """
    with path.open("rb") as lines:
        found = (line for _, line in numbered_lines(lines) if line.strip())
        first, second = next(found, b""), next(found, b"")
    begins = first.removeprefix(b"\xef\xbb\xbf").strip()
    if begins.startswith(b"[") or begins == b"{":
        return True
    try:
        value = parse_line(begins)
    except ValueError:
        return path.suffix.lower() == ".json"
    return not isinstance(value, dict) or (not second and _holds_rows(value, path))


def _holds_rows(value: dict[str, Any], path: Path) -> bool:
    """Whether the object is no row itself, but has lists of rows. In a .jsonl file it has nothing else."""
    lists = [key for key, item in value.items() if _name_of_split(key) and isinstance(item, list)]
    return bool(lists) and (path.suffix.lower() == ".json" or len(lists) == len(value))


def _name_of_split(key: str) -> str | None:
    return key if key == "data" else SPLIT_OF_WORD.get(key.lower())


def _document_text(path: Path) -> str:
    """The text of a valid JSON document."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        parse_row(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {not_json(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return text


def _elements(text: str, path: Path, split: str) -> Iterator[tuple[int, Any]]:
    """(position, value) of each element of the list of rows; the document is known to be valid."""
    at = _skip(text, 0)
    if text[at] == "{":
        at = _find_list(text, at, path, split)
    if text[at] != "[":
        raise ValueError(f'{path}: must hold a list of rows, or {{"data": [...]}}, or {{"{split}": [...]}}')
    at = _skip(text, at + 1)
    while text[at] != "]":
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)


def _find_list(text: str, at: int, path: Path, split: str) -> int:
    """Where the value of the object's key "data", or of ``split``, begins; or, if it has neither, where it begins."""
    begin, found = at, {}
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, end = _DECODER.raw_decode(text, at)
        at = _skip(text, end)
        if (name := _name_of_split(key)) and text[at] == "[":
            found[name] = at
        at = _skip(text, _DECODER.raw_decode(text, at)[1])
    if found and not (chosen := found.keys() & {"data", SPLIT_OF_WORD.get(split, split)}):
        raise ValueError(f"{path} has no {split!r} split; it has {', '.join(found)}")
    return found[min(chosen)] if found else begin


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
