"""Places that follow from the ids' bytes are those that the tokenizer counts."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers

from qsharded.data import encoded
from tests.data.folders import make_folder

TEXTS = [
    *("The quick brown fox", "", " ", "\n\n", "a\u00adb\x00c", "é日👩‍👧 2+2? é", "日本語", "<s>the<|im_end|> dog</s>"),
    *("<think>it is</think>  4 - of course!", "🦊" * 5, "\u0000\u00ff\u0100"),
]


def backend_of(folder: Path, kind: str = "byte-level") -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(make_folder(folder, kind) / "tokenizer.json"))
    backend.post_processor = None
    return backend


def places(one: encoded.Encoded, text: str) -> tuple[list[int], list[int], list[int]]:
    starts = [one.start(number) for number in range(len(one))]
    return one.ids, starts, [one.first_from(at) for at in range(len(text) + 2)]


def all_of(backend: tokenizers.Tokenizer, texts: list[str]) -> list[encoded.Encoded]:
    return encoded.Encoder(backend).all(texts)


@pytest.fixture(autouse=True)
def from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_FEW", 1)


def counted(backend: tokenizers.Tokenizer, texts: list[str]) -> list[encoded.Encoded]:
    return encoded.Encoder(backend)._counted(texts)


def assert_alike(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    pairs = zip(all_of(backend, texts), counted(backend, texts), texts, strict=True)
    assert all(places(ours, text) == places(theirs, text) for ours, theirs, text in pairs)


def test_places_are_those_that_the_tokenizer_counts(tmp_path: Path) -> None:
    backend = backend_of(tmp_path)
    assert {type(one) for one in all_of(backend, TEXTS)} == {encoded._Placed}
    assert_alike(backend, TEXTS)


def test_a_text_that_the_tokenizer_changes_is_counted(tmp_path: Path) -> None:
    backend = backend_of(tmp_path)
    backend.normalizer = normalizers.NFC()
    texts = ["e\u0301 fox", "the dog", "fox"]
    assert [type(one) for one in all_of(backend, texts)] == [encoded._Counted, encoded._Placed, encoded._Placed]
    assert_alike(backend, texts)


def test_where_most_texts_are_changed_all_are_counted(tmp_path: Path) -> None:
    backend = backend_of(tmp_path)
    backend.normalizer = normalizers.Lowercase()
    encoder = encoded.Encoder(backend)
    encoder.all(["The", "A", "fox"])
    assert [type(one) for one in encoder.all(["fox"])] == [encoded._Counted]


def test_other_vocabularies_are_counted(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, "metaspace")
    assert {type(one) for one in all_of(backend, TEXTS)} == {encoded._Counted}


def test_more_words_are_kept_once_texts_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_FEW", 3)
    given: list[tokenizers.Tokenizer] = []
    monkeypatch.setattr(encoded, "_keep_words", given.append)
    encoder = encoded.Encoder(backend := backend_of(tmp_path))
    for _ in range(3):
        encoder.all(["the", "fox"])
    assert given == [backend]
