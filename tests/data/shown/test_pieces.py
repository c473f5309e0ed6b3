import pytest

from qsharded.data import Example, Tokenizer, load_examples
from qsharded.data.shown.pieces import Piece, pieces, shortened
from tests.data import templates
from tests.data.folders import chat, make_folder, write_rows


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-bos", "metaspace"])
def test_pieces_are_the_text_that_is_tokenized_cut_at_what_is_trained(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", kind, templates.LLAMA3))
    messages = chat("a  b", "the dog é\n", "c", " fox")
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": messages})
    (example,) = load_examples(rows, tokenizer, max_length=512).examples
    found = pieces(example, tokenizer)
    assert "".join(piece.text for piece in found) == tokenizer.decode(example.ids.tolist())
    # A tokenizer may put a space behind special tokens.
    assert [piece.text.lstrip() for piece in found if piece.trained] == ["the dog é<|eot_id|>", "fox<|eot_id|>"]


def test_a_piece_keeps_the_space_that_it_begins_with(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", "metaspace"))
    given, ids = tokenizer.encode("the dog"), tokenizer.encode("the dog jumps")
    flags = [number >= len(given) for number in range(len(ids))]
    assert pieces(Example(ids, flags), tokenizer) == [Piece("the dog"), Piece(" jumps", True)]


def test_a_character_whose_bytes_are_trained_in_part_is_shown_on_both_sides(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model"))
    ids = tokenizer.encode("aé")
    assert len(ids) == 3
    assert [piece.trained for piece in pieces(Example(ids, [False, False, True]), tokenizer)] == [False, True]


def test_one_run_is_one_piece(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model"))
    ids = tokenizer.encode("the dog")
    for trained in (False, True):
        assert pieces(Example(ids, [trained] * len(ids)), tokenizer) == [Piece("the dog", trained)]


WHOLE = [Piece("0123456789"), Piece("abcdefghij", True), Piece("ABCDEFGHIJ")]


@pytest.mark.parametrize("characters", [0, 30, 99])
def test_what_is_short_enough_stays_whole(characters):
    assert shortened(WHOLE, characters) == WHOLE


def test_the_middle_is_left_out():
    assert shortened(WHOLE, 18) == [
        Piece("0123456789"),
        Piece("ab", True),
        Piece(" ... 12 characters ... ", gap=True),
        Piece("EFGHIJ"),
    ]
