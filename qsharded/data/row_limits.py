"""What a row's line may be. The reason alone is said here: file and line are known to the caller."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from qsharded.utils.untrusted_json import MEBIBYTE, is_deeper

LONGEST = 32 * MEBIBYTE
"""Bytes of a line: some eight million tokens, beyond every model's context."""
_DEEPEST = 64
_TOO_DEEP = f"not readable: lists and objects in each other, over {_DEEPEST} levels"


def numbered_lines(file: BinaryIO, number: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from where it is, with their numbers, the first of them ``number``. Of one that is too long
    the beginning comes, longer than ``LONGEST``, for :func:`parse_line` to refuse: it is never in memory as a whole."""
    while line := file.readline(LONGEST + 1):
        yield number, line
        number += 1
        while len(line) > LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST + 1)


def not_json(error: json.JSONDecodeError) -> str:
    """What is wrong with a text, and where."""
    return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def parse_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        ValueError: it is none, or longer or deeper than a row may be.
    """
    if len(line) > LONGEST:
        raise ValueError(f"the line has more than {LONGEST:,} bytes, which no row needs")
    try:
        return parse_row(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(not_json(error)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def parse_row(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        json.JSONDecodeError: it is none.
        ValueError: it is deeper than a row may be, or has an integer that Python does not read.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError:
        raise ValueError("not readable: an integer of more than 4,300 digits") from None
    if text.count("[") + text.count("{") > _DEEPEST and is_deeper(value, _DEEPEST):
        raise ValueError(_TOO_DEEP)
    return value
