"""Which row of a dataset a text was made of, found by what the row says: for the rare case that someone asks.

Nothing is kept for it meanwhile: examples are ids, and carry no file or line.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsharded.data.records import Row, read_rows

_COMPARED = 200  # characters of each of a row's texts: templates and truncation leave beginnings alone
_LISTED = 3


@dataclass
class _Best:
    """The rows whose texts a document has in it, those with most of them."""

    characters: int = 0
    origins: list[str] = field(default_factory=list)

    def add(self, characters: int, origin: str) -> None:
        if characters > self.characters:
            self.characters, self.origins = characters, []
        if characters and characters == self.characters and len(self.origins) < _LISTED:
            self.origins.append(origin)


def find_origins(documents: Sequence[str], sources: Sequence[tuple[str, str]], seconds: float) -> list[list[str]]:
    """For each document the rows that it was most likely made of, as ``file:line``, at most three; none where nothing
    was found within so many ``seconds``.

    Args:
        documents: as text, with or without special tokens.
        sources: (dataset, split).

    Raises:
        ValueError: a dataset that can no longer be read.
    """
    best, deadline = [_Best() for _ in documents], time.monotonic() + seconds
    plain = [_plain(document) for document in documents]
    for source, split in sources:
        for origin, row in read_rows(source, split=split):
            said = [_plain(text)[:_COMPARED] for text in _texts(row)]
            for document, found in zip(plain, best, strict=True):
                found.add(sum(len(text) for text in said if text in document), origin)
            if time.monotonic() > deadline:
                return [found.origins for found in best]
    return [found.origins for found in best]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _texts(value: Row | Any) -> Iterator[str]:
    """Every string in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
