"""Option values as text: command-line words to values, TOML values to values, values to TOML.

What cannot be converted comes back as it is: `options.check_values` has the words for it.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args, get_origin

from qsharded.config.options import NAMES, TEXTS, Option

_NAMES_ONLY = re.compile(r"\s*[\w.]+([,\s]+[\w.]+)*\s*")


def from_words(item: Option, words: Sequence[str]) -> Any:
    """The value that command-line words give an option.

    Raises:
        ValueError: a table's entry is no KEY=VALUE.
    """
    text = " ".join(words)
    if text == "" and item.optional:
        return None
    if item.repeated:
        return _texts(item, words)
    if get_origin(item.kind) is dict:
        return dict(_pair(item, entry) for entry in _entries(item, text))
    if get_origin(item.kind) is list:
        return [_number(get_args(item.kind)[0], word) for word in _split(text)]
    if item.kind == NAMES:
        return _names(text)
    return _number(item.kind, text)


def from_toml(item: Option, value: Any) -> Any:
    """The value that a parsed TOML value gives an option."""
    if value == "" and item.optional:
        return None
    if isinstance(value, str) and item.kind == NAMES:
        return _names(value)
    if item.repeated and isinstance(value, str | list):
        return _texts(item, [value] if isinstance(value, str) else value)
    return value


def to_toml(value: Any) -> str:
    """A value as TOML writes it; strings keep every character."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(key)} = {to_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, str):
        # JSON and TOML escape alike, but for the delete character, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _split(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _names(text: str) -> str | list[str]:
    return _split(text) if _NAMES_ONLY.fullmatch(text) else text


def _texts(item: Option, texts: Sequence[str]) -> str | tuple[str, ...]:
    return texts[0] if item.kind == TEXTS and len(texts) == 1 else tuple(texts)


def _entries(item: Option, text: str) -> list[str]:
    """The pairs of a table; a value that may be text may have commas and spaces in it."""
    is_text = get_args(item.kind)[1] in (str, Any)
    return re.split(r"[,\s]+(?=[\w.-]+=)", text.strip()) if is_text and text.strip() else _split(text)


def _pair(item: Option, entry: str) -> tuple[str, Any]:
    of = get_args(item.kind)[1]
    # A key may be a regular expression, a value may be text: the other one has no = in it.
    key, separator, value = entry.partition("=") if of in (str, Any) else entry.rpartition("=")
    if not separator or not key:
        raise ValueError(f"{item.flag} takes KEY=VALUE pairs, got {entry!r}")
    return key, _number(of, value)


def _number(kind: Any, text: str) -> Any:
    if kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    if kind is Any:
        with suppress(ValueError):
            return json.loads(text) if text != "null" else text  # TOML, which the run is written in, has no null
    return text
