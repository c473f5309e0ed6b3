import pyarrow
import pyarrow.parquet
import pytest

from qsharded.data import Tokenizer, load_examples
from qsharded.data.notes import data_notes
from tests.data import published, templates
from tests.data.folders import chat, make_folder, write_rows

CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def load(tmp_path, *rows, **options):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=templates.THINKING))
    return tokenizer, load_examples(write_rows(tmp_path / "rows.jsonl", *rows), tokenizer, max_length=512, **options)


def trained(tokenizer, example):
    return tokenizer.decode(example.ids[example.trained].tolist())


EMPTY = [
    {"instruction": "why", "output": ""},
    {"instruction": "why", "input": "x", "output": " \n"},
    {"messages": chat("why", "")},
    {"messages": chat("why", "<think>\n\n</think>\n\n")},
    {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "  "}]},
    {"prompt": "why", "completion": ""},
    {"prompt": chat("why"), "completion": [{"role": "assistant", "content": ""}]},
    {"question": "why", "answer": ""},
    {"messages": [*chat("why"), {"role": "assistant"}]},
    {"messages": [*chat("why"), {"role": "assistant", "content": None, "tool_calls": None}]},
    {"messages": [*chat("why"), {"role": "assistant", "content": []}]},
    {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": None}]},
    {"instruction": "why", "output": None},
    {"prompt": "why", "completion": None},
    {"question": "why", "answer": None, "text": None},
]


@pytest.mark.parametrize("row", EMPTY)
def test_rows_of_empty_answers_are_left_out_and_counted(tmp_path, row):
    good = {"messages": chat("a", "fox")}
    tokenizer, dataset = load(tmp_path, good, row, row)
    assert [trained(tokenizer, example).split(">\n\n")[-1] for example in dataset.examples] == ["fox<|im_end|>"]
    assert dataset.empty == 2
    (note,) = data_notes(dataset, one_example_per_answer=False)
    assert note.startswith("note: 2 rows with empty answers, no content and no tool calls, which are not trained on, a")
    assert f"{tmp_path / 'rows.jsonl'}:2, " in note
    assert "why" in note
    assert "--train-on-empty-answers" in note


@pytest.mark.parametrize("row", EMPTY)
def test_they_are_trained_if_asked_for(tmp_path, row):
    tokenizer, dataset = load(tmp_path, row, train_on_empty_answers=True)
    (example,) = dataset.examples
    assert trained(tokenizer, example).strip().endswith(("<|im_end|>", "</s>"))
    assert not dataset.omitted
    assert dataset.empty == 0


def test_other_answers_of_the_row_are_trained(tmp_path):
    tokenizer, dataset = load(tmp_path, {"messages": chat("a", "fox", "b", "", "c", "")})
    (example,) = dataset.examples
    assert trained(tokenizer, example).removeprefix("<think>\n\n</think>\n\n") == "fox<|im_end|>"
    assert "c" not in tokenizer.decode(example.ids.tolist()).split("<|im_end|>")[-1], "nothing depends on the rest"
    assert dataset.empty == 0
    (note,) = data_notes(dataset, one_example_per_answer=False)
    assert f"{tmp_path / 'rows.jsonl'}:1, message 3: 'b'" in note


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nso\n</think>\n\n"},
        {"content": "0"},
    ],
)
def test_answers_that_say_something_are_none(tmp_path, answer):
    _, dataset = load(tmp_path, {"messages": [*chat("a"), {"role": "assistant"} | answer]})
    assert len(dataset.examples) == 1
    assert dataset.empty == 0


def test_answers_that_are_not_to_be_trained_are_none(tmp_path):
    messages = [*chat("a"), {"role": "assistant", "content": "", "train": False}, *chat("b", "fox")]
    _, dataset = load(tmp_path, {"messages": messages})
    assert not dataset.omitted


def test_where_all_is_trained_they_are_too(tmp_path):
    _, dataset = load(tmp_path, {"messages": chat("a", "")}, train_on="all")
    assert len(dataset.examples) == 1


def test_null_answers_of_parquet_are_those_of_json(tmp_path):
    rows = [{"prompt": "a", "completion": "fox"}, {"prompt": "why", "completion": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=templates.THINKING))
    dataset = load_examples(tmp_path / "rows.parquet", tokenizer, max_length=512)
    assert (len(dataset.examples), dataset.empty, dataset.omitted["empty answer"].rows) == (1, 1, 1)


def test_a_null_column_beside_a_whole_format_is_not_there(tmp_path):
    _, dataset = load(tmp_path, {"text": "fox", "prompt": None, "completion": None})
    assert (len(dataset.examples), dataset.empty) == (1, 0)


@pytest.mark.parametrize(
    "answer",
    [{"reasoning_content": "why"}, {"content": "<think>\nwhy\n</think>\n\n"}, {"content": "", "thinking": "why"}],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_reasoning_alone_is_an_answer_where_it_is_written(tmp_path, answer, keeps):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=published.QWEN3))
    follows = [] if keeps else chat("c", "fox")[-2:]  # Qwen3 writes the last turn's alone
    path = write_rows(tmp_path / "rows.jsonl", {"messages": [*chat("a"), {"role": "assistant", **answer}, *follows]})
    dataset = load_examples(path, tokenizer, max_length=512)
    (example,) = dataset.examples
    assert trained(tokenizer, example).replace("\n", "") == (
        "<think>why</think><|im_end|>" if keeps else "<think></think>fox<|im_end|>"
    )
    assert [*dataset.omitted] == ([] if keeps else ["reasoning"])
