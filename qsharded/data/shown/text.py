"""A preview as lines: trained tokens in colour on a terminal, in brackets elsewhere."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from qsharded.data.shown.pieces import Piece
from qsharded.data.shown.preview import Preview, ShownRow
from qsharded.data.shown.statistics import Bin

_WIDTH = 40
# What a terminal would act on, all but tab and line feed.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Marks:
    """What stands around trained tokens, around a word on what is left out, and how the former is explained."""

    begin: str
    end: str
    dim: str
    plain: str
    legend: str


BRACKETS = Marks("[[", "]]", "", "", "trained tokens stand in [[ ]]")
COLOUR = Marks("\x1b[32m", "\x1b[0m", "\x1b[2m", "\x1b[0m", "trained tokens are \x1b[32mgreen\x1b[0m")


def marks_for(stream: TextIO) -> Marks:
    """Colour where ``stream`` is a terminal, unless ``NO_COLOR`` (no-color.org) is set."""
    return COLOUR if stream.isatty() and not os.environ.get("NO_COLOR") else BRACKETS


def lines(preview: Preview, marks: Marks) -> list[str]:
    """The whole preview."""
    head = [f"{preview.name}: {preview.counts}"]
    if preview.statistics is not None:
        head += [f"  {preview.statistics.line()}", *_bars(preview.statistics.histogram())]
    return [*head, *preview.notes, *rows(preview, marks)]


def rows(preview: Preview, marks: Marks) -> list[str]:
    """The rows, each behind a line on it."""
    shown = [line for row in preview.rows for line in _row(row, marks)]
    return [f"rows as the model sees them; {marks.legend}", *shown] if shown else []


def _row(row: ShownRow, marks: Marks) -> Iterator[str]:
    yield f"--- row {row.number:,}: {row.tokens:,} tokens, {row.trained:,} trained"
    yield "".join(_marked(piece, marks) for piece in row.pieces)


def _marked(piece: Piece, marks: Marks) -> str:
    text = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), piece.text)
    if piece.gap:
        return marks.dim + text + marks.plain
    return marks.begin + text + marks.end if piece.trained else text


def _bars(bins: list[Bin]) -> Iterator[str]:
    most = max(one.rows for one in bins)
    of_length, of_rows = len(f"{bins[-1].most:,}"), len(f"{most:,}")
    for one in bins:
        bar = " " + "#" * -(-one.rows * _WIDTH // most) if one.rows else ""
        yield f"  {one.least:>{of_length},} - {one.most:>{of_length},}  {one.rows:>{of_rows},}{bar}"
