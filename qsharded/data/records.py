"""Rows of a dataset, each with the place that it came from."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsharded.data.row_limits import numbered_lines, parse_line, parse_row
from qsharded.data.sources import SPLIT_OF_WORD, find_files

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
# With what is wrong in the place of a row that is malformed.
FoundRows = Iterator[tuple[str, Row | ValueError]]

_DECODER = json.JSONDecoder()
_GAP = re.compile(r"[ \t\r\n]*[,:]?[ \t\r\n]*")  # what stands between two values of a JSON document


def read_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Each row of a dataset with its origin, ``file:line`` (of a parquet file: ``file:row``, from 1).

    Args:
        source: a .jsonl file (one object a line), a .json file (a list of objects, ``{"data": [...]}``, or a list for
            each split, ``{"train": [...]}``), a .parquet file, a folder of such files, or a Hub dataset id; see
            :func:`qsharded.data.sources.find_files`. Of .json and .jsonl the content tells which of both it is.
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
    for path in find_files(source, split):
        if not path.stat().st_size:
            raise ValueError(f"{path}: the file is empty: it was not written, or not downloaded, to its end")
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path)
        elif _is_document(path):
            yield from _json_document(path, split)
        else:
            yield from _json_lines(path)


def _json_lines(path: Path) -> FoundRows:
    with path.open("rb") as lines:
        for number, line in numbered_lines(lines):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


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
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
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


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError that names no file
        raise ValueError(f"{path}: not readable as parquet: {error}") from None


def _without_nulls(value: Any) -> Any:
    """``value`` less its null fields: Arrow gives each struct every field that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
