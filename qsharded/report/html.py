"""Pieces of pages: documents, tables, tiles, and numbers in words."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from qsharded.report.style import PAGE_STYLE


def document(title: str, body: str) -> str:
    """A page that needs nothing else: no script, no font, no picture from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def section(heading: str, body: str) -> str:
    """A part of a page; nothing where it is empty."""
    return f"<h2>{escape(heading)}</h2>\n{body}" if body else ""


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; what is empty is left out."""
    shown = [(name, text(value)) for name, value in rows if value not in ("", [], {})]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in shown)
    return f'<table class="facts">{cells}</table>\n' if cells else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text, and the others are numbers; cells of a row are HTML."""
    heads = "".join(f"<th{_kind(number)}>{escape(name)}</th>" for number, name in enumerate(head))
    cells = "".join(
        "<tr>" + "".join(f"<td{_kind(n)}>{cell}</td>" for n, cell in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{cells}</tbody></table></div>\n'


def _kind(number: int) -> str:
    return ' class="n"' if number else ""


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Key figures: (what, how much)."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in values
    )
    return f'<div class="tiles">{shown}</div>\n'


def text(value: Any) -> str:
    """A value of settings as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={text(entry)}" for key, entry in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def figure(key: str, value: float | None) -> str:
    """A measured value; shares in percent."""
    if value is None:
        return "\N{EN DASH}"
    if "exact_match" in key:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def short(count: float) -> str:
    """A large number with its thousands named."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.3g}{letter}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02} min" if hours else f"{minute} min {second:02} s" if minute else f"{second} s"
