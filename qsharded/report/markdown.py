"""Markdown for model cards: tables, code, and the metadata in front that the Hub reads."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SPARKS = "▁▂▃▄▅▆▇█"


def front_matter(values: Mapping[str, Any]) -> str:
    """YAML between its two lines; what is None or empty is left out."""
    lines = [f"{key}: {_yaml(value)}" if isinstance(value, str) else f"{key}:{_list(value)}" for key, value in
             values.items() if value]  # fmt: skip
    return "\n".join(["---", *lines, "---", ""])


def _list(values: Iterable[str]) -> str:
    return "".join(f"\n- {_yaml(value)}" for value in values)


def _yaml(text: str) -> str:
    """A text as JSON writes it, which every YAML reader takes for the same text, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def section(title: str, body: str) -> str:
    """A part of the page; nothing where it would be empty."""
    return f"\n## {title}\n\n{body.strip()}\n" if body.strip() else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows under their heads, numbers with their thousands set apart; nothing without rows."""
    body = ["| " + " | ".join(map(_cell, row)) + " |\n" for row in rows]
    if not body:
        return ""
    return f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n{''.join(body)}\n"


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = json.dumps(value) if isinstance(value, list | dict | bool) or value is None else str(value)
    return plain(text)


def plain(text: str) -> str:
    """``text`` on one line, in which no character means more than itself."""
    for special in "\\`*_[]<>|":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def code(text: str, language: str) -> str:
    """A block of code, whatever fences are in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def sparkline(values: Sequence[float]) -> str:
    """A curve as a line of text."""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / ((high - low) or 1.0)
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)
