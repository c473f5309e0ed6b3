"""Texts to ids, with the place of each id in its text.

A tokenizer that keeps count of places takes a third longer than one that does not. Where the ids' own bytes, one after
the other, are the text's bytes, the places follow from their lengths; so it is with byte-level BPE. Elsewhere, as with
tokenizers that change the text first, the tokenizer keeps count.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tokenizers
from numpy.typing import NDArray

_FEW = 2000  # texts; the table of a large vocabulary takes as long to make as so many save
_KEPT_WORDS = 100_000  # whose ids the tokenizer keeps: ten times as many as by itself, for 7% less time


class Encoded:
    """A text's ids, and where in the text they start.

    Attributes:
        ids: of the text, in its order.
    """

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    @cached_property
    def array(self) -> NDArray[np.int32]:
        """The ids: int32 [T]."""
        return np.array(self.ids, np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def first_from(self, character: int) -> int:
        """The number of the first id that starts at this character of the text or behind it; that of ids, if none."""
        return bisect_left(range(len(self)), character, key=self.start)

    def start(self, number: int) -> int:
        """The character at which the id of this number starts; never less than that of the one before it."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Vocabulary:
    """What ids stand for.

    Attributes:
        pieces: bytes of each id.
        lengths: int64 [V] of these.
    """

    pieces: list[bytes]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "_Vocabulary | None":
        """None if it is not that of byte-level BPE."""
        pieces = _bytes_of_ids(backend)
        return None if pieces is None else cls(pieces, np.array([len(piece) for piece in pieces]))


class Encoder:
    """Puts texts through ``backend``, on all cores."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._seen = 0
        self._is_exact = True  # as far as is known

    def all(self, texts: Sequence[str]) -> list[Encoded]:
        """The ids of each text, no beginning or end added."""
        if self._seen < _FEW <= self._seen + len(texts):
            _keep_words(self._backend)
        self._seen += len(texts)
        if self._seen < _FEW or not self._is_exact or self._vocabulary is None:
            return self._counted(texts)
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        placed = [_placed(text, one.ids, self._vocabulary) for text, one in zip(texts, found, strict=True)]
        changed = [text for text, one in zip(texts, placed, strict=True) if one is None]
        self._is_exact = 2 * len(changed) <= len(texts)
        counted = iter(self._counted(changed))
        return [next(counted) if one is None else one for one in placed]

    def _counted(self, texts: Sequence[str]) -> list[Encoded]:
        return [_Counted(found) for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    @cached_property
    def _vocabulary(self) -> _Vocabulary | None:
        return _Vocabulary.of(self._backend)


class _Counted(Encoded):
    def __init__(self, found: tokenizers.Encoding) -> None:
        super().__init__(found.ids)
        self._found = found  # its list of all places takes longer to make than the few that are asked for

    def first_from(self, character: int) -> int:
        number = self._found.char_to_token(character)  # one that has the character, if one has it
        if number is None:
            return super().first_from(character)
        while number > 0 and self.start(number - 1) >= character:
            number -= 1
        while number < len(self) and self.start(number) < character:
            number += 1
        return number

    def start(self, number: int) -> int:
        place = self._found.token_to_chars(number)
        assert place is not None, "of the text: the tokenizer adds none"
        return place[0]


class _Placed(Encoded):
    def __init__(self, text: str, content: bytes, ids: list[int], vocabulary: _Vocabulary) -> None:
        super().__init__(ids)
        lengths = vocabulary.lengths[self.array]
        self._starts: NDArray[np.int64] = np.cumsum(lengths) - lengths
        if not text.isascii():
            self._starts = _characters(content)[self._starts]

    def first_from(self, character: int) -> int:
        return int(self._starts.searchsorted(character))

    def start(self, number: int) -> int:
        return int(self._starts[number])


def _placed(text: str, ids: list[int], vocabulary: _Vocabulary) -> _Placed | None:
    """None where the ids do not stand for the text's own bytes."""
    content = text.encode()
    if b"".join(map(vocabulary.pieces.__getitem__, ids)) != content:
        return None
    return _Placed(text, content, ids, vocabulary)


def _characters(content: bytes) -> NDArray[np.int64]:
    """The number of the character that each byte of a text is of."""
    begins = (np.frombuffer(content, np.uint8) & 0xC0) != 0x80
    numbers: NDArray[np.int64] = np.cumsum(begins) - 1
    return numbers


def _bytes_of_ids(backend: tokenizers.Tokenizer) -> list[bytes] | None:
    """What each id stands for; None if the vocabulary is not of byte-level BPE."""
    byte_of = _byte_of_letter()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {number: token.content.encode() for number, token in backend.get_added_tokens_decoder().items()}
    found = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        if number not in added and not byte_of.keys() >= set(token):
            return None
        found[number] = added.get(number) or bytes(byte_of[letter] for letter in token)
    return found


def _keep_words(backend: tokenizers.Tokenizer) -> None:
    """Have BPE remember the ids of more words; it is given no other ids by that."""
    resize = getattr(backend.model, "_resize_cache", None)  # no version of tokenizers promises it
    if resize is not None:
        resize(_KEPT_WORDS)


def _byte_of_letter() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
