"""What is shown of a dataset: its numbers, what is told of its rows, and some rows."""

from dataclasses import dataclass

from qsharded.data.examples import Dataset
from qsharded.data.notes import data_notes
from qsharded.data.shown.pieces import Piece, pieces, shortened
from qsharded.data.shown.statistics import Statistics
from qsharded.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ShownRow:
    """A row of the dataset, the ``number``-th from 1, of so many tokens."""

    number: int
    tokens: int
    trained: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Preview:
    """A dataset, for people.

    Attributes:
        name: what the user calls it.
        counts: examples, and rows that became none, in words.
        statistics: of the examples; None if there are none.
        notes: what is told of its rows, a line each.
        rows: some of them, from the whole of the dataset.
    """

    name: str
    counts: str
    statistics: Statistics | None
    notes: list[str]
    rows: list[ShownRow]

    @classmethod
    def of(
        cls,
        name: str,
        data: Dataset,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        one_example_per_answer: bool,
        rows: int,
        characters: int,
        share: str = "",
    ) -> "Preview":
        """Of ``data``, with so many ``rows``, each cut to so many ``characters`` (0: whole).

        ``share``: what is to be said behind the numbers of examples.
        """
        count = len(data.examples)
        numbers = [number * count // rows for number in range(rows)] if count > rows else range(count)
        return cls(
            name,
            _counts(data, max_length) + share,
            Statistics.of(data.examples) if count else None,
            data_notes(data, one_example_per_answer),
            [_shown(data, number, tokenizer, characters) for number in numbers],
        )


def _shown(data: Dataset, number: int, tokenizer: Tokenizer, characters: int) -> ShownRow:
    example = data.examples[number]
    cut = shortened(pieces(example, tokenizer), characters)
    return ShownRow(number + 1, len(example), example.trained_tokens, cut)


def _counts(data: Dataset, max_length: int) -> str:
    """How many examples there are, and how many rows became none or part of one, in words."""
    others = {
        "too long and dropped": data.dropped,
        "truncated": data.truncated,
        "blank or without an answer": data.empty,
        "bad and left out": data.bad,
    }
    listed = "".join(f", {count:,} {what}" for what, count in others.items() if count)
    count = len(data.examples)
    return f"{count:,} row{'s' if count != 1 else ''} of up to {max_length} tokens{listed}"
