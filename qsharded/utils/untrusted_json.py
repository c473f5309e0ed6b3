"""JSON from outside, looked at before anyone uses it: its size and depth, its keys' types and ranges.

Whatever is wrong is a ValueError that begins with the file and names the key. A schema is a dict from a key to the
:class:`Kind` of its values; keys that it does not have are left to whoever reads them.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qsharded.utils.regular_files import regular_size

MEBIBYTE = 1 << 20
_LONGEST_FILE = 64 * MEBIBYTE  # the index of the largest models has some 10
_DEEPEST = 64  # chat templates' tools have some 10
_ESCAPED_HALF = re.compile(rb"\\u[dD]")
_SHOWN = 80  # characters of a value that a message shows


def parse(raw: bytes, origin: str, *, longest: int = _LONGEST_FILE, deepest: int = _DEEPEST) -> Any:
    """The value of a JSON text, in which no key comes twice and every number is finite.

    Args:
        origin: what the message begins with: the file, and what else finds the text.
        longest: bytes.
        deepest: lists and objects in each other.

    Raises:
        ValueError: it is longer or deeper, or no such JSON.
    """
    if len(raw) > longest:
        raise ValueError(f"{origin} has {len(raw):,} bytes of JSON, more than {longest:,}")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is not valid JSON: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{origin} is not valid JSON: it is nested too deeply, over {deepest} levels") from None
    except ValueError as error:  # of the syntax, or an integer of thousands of digits
        raise ValueError(f"{origin} is not valid JSON: {error}") from None
    if _ESCAPED_HALF.search(raw) and _has_lone_surrogate(value):
        raise ValueError(f"{origin} is not valid JSON: half of a surrogate pair stands alone in a string")
    if is_deeper(value, deepest):
        raise ValueError(f"{origin} is nested too deeply, over {deepest} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {shown(twice)} comes twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def is_deeper(value: Any, levels: int) -> bool:
    """Whether more than so many lists and objects lie in each other."""
    at = [value]
    for _ in range(levels + 1):
        at = [item for outer in at if isinstance(outer, dict | list) for item in _items(outer)]
        if not at:
            return False
    return True


def _items(outer: dict | list) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def read_json(path: Path, *, longest: int = _LONGEST_FILE) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: missing, no regular file, too large, not JSON, or not an object; the message names the file.
    """
    try:
        size = regular_size(path)
        raw = b"" if size > longest else path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if size > longest:
        raise ValueError(f"{path} has {size:,} bytes of JSON, more than {longest:,}")
    return as_object(parse(raw, str(path), longest=longest), str(path))


def as_object(value: Any, origin: str) -> dict[str, Any]:
    """``value``, which must be a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{origin} must hold a JSON object, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        words: that, behind "must be".
        holds: whether a value is of it.
        item: what a list or object of it has in it.
    """

    words: str
    holds: Callable[[Any], bool]
    item: "Kind | None" = None

    def __or__(self, other: "Kind") -> "Kind":
        words = f"{self.words} or {other.words}"
        return Kind(words, lambda value: self.holds(value) or other.holds(value), self.item or other.item)


def check(value: Mapping[str, Any], schema: Mapping[str, Kind], origin: str) -> None:
    """Raise ValueError, naming ``origin`` and the key, where a value is not of its kind. No key need be there."""
    for key, kind in schema.items():
        if key in value and not kind.holds(value[key]):
            raise ValueError(f"{origin}: {_fault(key, value[key], kind)}")


def _fault(key: str, value: Any, kind: Kind) -> str:
    """What is wrong with ``value``, or with the first value in it."""
    if kind.item is not None and isinstance(value, list | dict):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            if not kind.item.holds(inner):
                return _fault(f"{key} has {shown(name)}, which", inner, kind.item)
    return f"{key} must be {kind.words}, got {shown(value)}"


def require(value: Mapping[str, Any], schema: Mapping[str, Kind], origin: str) -> None:
    """The same, and every key must be there."""
    for key in schema:
        if key not in value:
            raise ValueError(f"{origin}: {key} is missing")
    check(value, schema, origin)


@contextmanager
def named(origin: str) -> Iterator[None]:
    """Have the message of a ValueError begin with ``origin``."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(origin):
            raise
        raise ValueError(f"{origin}: {error}") from error


def shown(value: Any) -> str:
    """The value as a message shows it, however large it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | dict) and len(value) > _SHOWN:
        return f"{type(value).__name__} of {len(value):,}"
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def integer(least: int, most: int) -> Kind:
    """A whole number from ``least`` to ``most``; true and false are none."""
    words = f"an integer from {least:,} to {most:,}"
    return Kind(words, lambda value: type(value) is int and least <= value <= most)


def number(above: float, most: float, *, or_equal: bool = False) -> Kind:
    """A finite number above ``above``, or with ``or_equal`` that itself, up to ``most``."""
    words = f"a number {'from' if or_equal else 'above'} {above:g}, up to {most:g}"

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:
            return False
        return math.isfinite(value) and (above < value or (or_equal and above == value)) and value <= most

    return Kind(words, holds)


_LARGEST = 1e300  # what an int can be and still become a float

BOOLEAN = Kind("true or false", lambda value: type(value) is bool)
NULL = Kind("null", lambda value: value is None)
ANY = Kind("anything", lambda value: True)


def text(longest: int = 4096) -> Kind:
    """A string of so many characters at most."""
    return Kind(f"a string of up to {longest:,} characters", lambda v: isinstance(v, str) and len(v) <= longest)


def one_of(*values: Any) -> Kind:
    """One of these, of the same type."""
    words = f"one of {', '.join(map(repr, values))}"
    return Kind(words, lambda value: any(type(value) is type(known) and value == known for known in values))


def list_of(item: Kind, most: int) -> Kind:
    """A list of up to so many of a kind."""
    words = f"a list of up to {most:,}, each {item.words}"
    return Kind(words, lambda v: isinstance(v, list) and len(v) <= most and all(map(item.holds, v)), item)


def map_of(item: Kind, most: int, key: Kind = text()) -> Kind:  # noqa: B008  (a constant)
    """An object of up to so many keys of a kind, with values of another."""

    def holds(value: Any) -> bool:
        if not isinstance(value, dict) or len(value) > most:
            return False
        return all(key.holds(name) and item.holds(inner) for name, inner in value.items())

    return Kind(f"an object of up to {most:,} keys, each {key.words}, with values each {item.words}", holds, item)


def object_of(schema: Mapping[str, Kind], *required: str, alone: bool = False) -> Kind:
    """An object with these keys of these kinds, of which ``required`` must be there; ``alone``: and no other."""
    words = "an object of " + ", ".join(f"{key} ({kind.words})" for key, kind in schema.items())

    def holds(value: Any) -> bool:
        if not isinstance(value, dict) or not value.keys() >= set(required) or (alone and value.keys() - schema):
            return False
        return all(kind.holds(value[key]) for key, kind in schema.items() if key in value)

    return Kind(words, holds)
