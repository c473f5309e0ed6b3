"""An example as text, cut where its trained tokens begin and end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qsharded.data.examples import Example
from qsharded.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Text of which all tokens are trained, or none is; or, with ``gap``, a word on what is left out there."""

    text: str
    trained: bool = False
    gap: bool = False


def pieces(example: Example, tokenizer: Tokenizer) -> list[Piece]:
    """The text of ``example``, special tokens included, in unbroken runs."""
    ids, flags = example.ids.tolist(), example.trained
    ends = [*(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(ids)]
    found, before = [], ""
    for start, end in zip([0, *ends], ends, strict=False):
        # Decoded from the beginning: alone, a run would lose the space that it begins with under some tokenizers.
        text = tokenizer.decode(ids[:end])
        run = text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[start:end])
        found.append(Piece(run, bool(flags[start])))
        before = text
    return found


def shortened(whole: Sequence[Piece], characters: int) -> list[Piece]:
    """The pieces, or, where they are longer in all, their first two thirds and last third of so many characters.

    Args:
        characters: 0 leaves all.
    """
    length = sum(len(piece.text) for piece in whole)
    if not characters or length <= characters:
        return list(whole)
    tail = characters // 3
    head = characters - tail
    gap = Piece(f" ... {length - characters:,} characters ... ", gap=True)
    return [*_between(whole, 0, head), gap, *_between(whole, length - tail, length)]


def _between(whole: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """What stands from character ``start`` to ``end``."""
    kept, at = [], 0
    for piece in whole:
        text = piece.text[max(0, start - at) : max(0, end - at)]
        if text:
            kept.append(Piece(text, piece.trained))
        at += len(piece.text)
    return kept
