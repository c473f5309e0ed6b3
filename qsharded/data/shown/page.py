"""Previews as one HTML page that needs nothing else."""

from collections.abc import Iterator, Sequence
from html import escape

from qsharded.data.shown.pieces import Piece
from qsharded.data.shown.preview import Preview, ShownRow
from qsharded.data.shown.statistics import Bin

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; overflow-wrap: anywhere; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .6rem .8rem; border: 1px solid #8885; border-top: 0; border-radius: 0 0 6px 6px; }
mark { background: #b5e8b0; color: #0a3d0a; border-radius: 3px; }
.row { margin: 1rem 0; } .head { background: #8882; border: 1px solid #8885; border-radius: 6px 6px 0 0;
  padding: .2rem .8rem; font-size: .9em; }
.gap { opacity: .6; font-style: italic; }
.note { border-left: 4px solid #d9a400; padding: .2rem .8rem; margin: .4rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td { padding: .05rem .6rem .05rem 0; }
.bar { background: #4a8fd6; height: .8rem; min-width: 1px; } td.wide { width: 24rem; }
@media (prefers-color-scheme: dark) { mark { background: #1f5a24; color: #d6f5d2; } }
"""


def page(previews: Sequence[Preview], title: str) -> str:
    """The page of all ``previews``."""
    body = "".join(part for preview in previews for part in _preview(preview))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n<p>Rows as the model sees them; <mark>trained tokens</mark> are marked.</p>\n"
        f"{body}</body></html>\n"
    )


def _preview(preview: Preview) -> Iterator[str]:
    yield f"<h2>{escape(preview.name)}</h2>\n<p>{escape(preview.counts)}"
    if preview.statistics is not None:
        yield f"<br>{escape(preview.statistics.line())}</p>\n<table>\n"
        bins = preview.statistics.histogram()
        yield from (_bar(one, max(one.rows for one in bins)) for one in bins)
        yield "</table>\n"
    yield from (f'<p class="note">{escape(note)}</p>\n' for note in preview.notes)
    yield from map(_row, preview.rows)


def _bar(one: Bin, most: int) -> str:
    width = 100 * one.rows / most
    bar = f'<div class="bar" style="width:{width:.1f}%"></div>' if one.rows else ""
    return f'<tr><td>{one.least:,} &ndash; {one.most:,}</td><td class="wide">{bar}</td><td>{one.rows:,}</td></tr>\n'


def _row(row: ShownRow) -> str:
    head = f"row {row.number:,}: {row.tokens:,} tokens, {row.trained:,} trained"
    return f'<div class="row"><div class="head">{head}</div><pre>{"".join(map(_piece, row.pieces))}</pre></div>\n'


def _piece(piece: Piece) -> str:
    text = escape(piece.text)
    if piece.gap:
        return f'<span class="gap">{text}</span>'
    return f"<mark>{text}</mark>" if piece.trained else text
