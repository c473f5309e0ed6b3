import json

import pytest

from qsharded.data import Tokenizer, load_examples
from qsharded.data.bad_rows import SHOWN, refuse_bad_rows
from qsharded.data.notes import data_notes
from tests.data import templates
from tests.data.folders import chat, make_folder

GOOD = json.dumps({"messages": chat("a", "fox")})
CALL = {"role": "assistant", "tool_calls": [{"name": "f"}]}
# Each is refused at another stage: the line, the row, its messages, the template.
BAD = {
    "nope": "not JSON: Expecting value at column 1",
    '{"id": 3}': "the fields fit no known format",
    json.dumps({"messages": chat("a")}): "the conversation has no message of the assistant to learn",
    json.dumps({"messages": [*chat("a"), CALL]}): "the chat template refuses this conversation: no tools",
}
REFUSING = "{% for m in messages if m.tool_calls %}{{ raise_exception('no tools') }}{% endfor %}" + templates.CHATML


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_folder(make_folder(tmp_path / "model", "byte-level-bos", REFUSING))


def load(tmp_path, tokenizer, *lines, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return load_examples(path, tokenizer, max_length=64, **options)


def test_a_bad_row_is_named_with_what_goes_on_without_it(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="not JSON") as raised:
        load(tmp_path, tokenizer, GOOD, "nope")
    where = f"{tmp_path / 'rows.jsonl'}:2: not JSON: Expecting value at column 1"
    assert str(raised.value) == f"{where} (--bad-rows skip:1 goes on without it)"


@pytest.mark.parametrize("stages", [list(BAD), list(BAD)[::-1]])
def test_all_bad_rows_are_named_at_once_in_their_order(tmp_path, tokenizer, stages):
    with pytest.raises(ValueError, match="4 rows cannot be used") as raised:
        load(tmp_path, tokenizer, GOOD, *stages, GOOD, skip_bad_rows=3)
    first, *listed, last = str(raised.value).splitlines()
    assert first == "4 rows cannot be used:"
    assert last == "(--bad-rows skip:4 goes on without them)"
    for number, (line, row) in enumerate(zip(listed, stages, strict=True), 2):
        assert line.startswith(f"  {tmp_path / 'rows.jsonl'}:{number}: ")
        assert BAD[row] in line


def test_the_reading_stops_where_no_more_can_be_listed(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=f"at least {SHOWN} rows cannot be used:") as raised:
        load(tmp_path, tokenizer, *["nope"] * (SHOWN + 9), GOOD)
    assert str(raised.value).count("not JSON") == SHOWN
    assert str(raised.value).endswith(f"(--bad-rows skip:{SHOWN} goes on without so many)")


def test_as_many_as_may_be_skipped_are_skipped_and_told(tmp_path, tokenizer):
    count = SHOWN + 5
    dataset = load(tmp_path, tokenizer, *["nope"] * count, GOOD, skip_bad_rows=count)
    assert len(dataset.examples) == 1
    (note,) = data_notes(dataset, one_example_per_answer=False)
    first, *listed, last = note.splitlines()
    assert first == f"note: {count} bad rows are left out (--bad-rows):"
    where = tmp_path / "rows.jsonl"
    assert listed == [f"  {where}:{n}: not JSON: Expecting value at column 1" for n in range(1, SHOWN + 1)]
    assert last == "  and 5 more"
    with pytest.raises(ValueError, match=f"{count} rows cannot be used"):
        load(tmp_path, tokenizer, *["nope"] * count, GOOD, skip_bad_rows=count - 1)


def test_rows_behind_bad_ones_are_what_they_were(tmp_path, tokenizer):
    alone = load(tmp_path, tokenizer, GOOD, GOOD)
    among = load(tmp_path, tokenizer, *list(BAD)[:2], GOOD, *list(BAD)[2:4], GOOD, skip_bad_rows=4)
    assert among.bad == 4
    assert [e.ids.tolist() for e in among.examples] == [e.ids.tolist() for e in alone.examples]


def test_nothing_is_refused_or_said_where_all_rows_are_good(tmp_path, tokenizer):
    refuse_bad_rows(0, [], 0, all_read=True)
    dataset = load(tmp_path, tokenizer, GOOD)
    assert data_notes(dataset, one_example_per_answer=False) == []


def test_a_row_without_a_token_to_learn_is_bad_too(tmp_path):
    mark = "{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% endif %}"
    source = "{% for m in messages %}{{ m.content }}" + mark + "</s>{% endfor %}"
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=source))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the row has no token to learn"):
        load(tmp_path, tokenizer, json.dumps({"messages": chat("a", "b")}), train_on_turn_ends=False)
