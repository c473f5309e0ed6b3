"""The end of each trained turn: trained, or told of."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from qsharded.data import Tokenizer, load_examples
from qsharded.data.notes import data_notes
from tests.data import published, templates
from tests.data.folders import chat, make_folder, write_rows

ONE, TWO = chat("a", "fox"), chat("a", "fox", "b", "dog")


def marked(header, ending, before="", behind="", role="assistant"):
    """A template that marks ``before``, the content and ``behind``, and has ``ending`` behind the marks."""
    return (
        "{% for m in messages %}{{ '" + header + "' }}{{ m.role }}{{ '\\n' }}"
        "{% if m.role == '" + role + "' %}"
        "{% generation %}{{ '" + before + "' + m.content + '" + behind + "' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{{ '" + behind + "' }}{% endif %}"
        "{{ '" + ending + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + header + "assistant\\n' }}{% endif %}"
    )


def load(tmp_path, template, *chats, **options):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=template))
    rows = write_rows(tmp_path / "rows.jsonl", *({"messages": messages} for messages in chats))
    return tokenizer, load_examples(rows, tokenizer, max_length=512, **options)


def trained(tokenizer, example):
    """The trained texts, parted by a bar."""
    ids, runs = example.ids.tolist(), []
    for number, flag in enumerate(example.trained.tolist()):
        if flag and (number == 0 or not example.trained[number - 1]):
            runs.append([])
        if flag:
            runs[-1].append(ids[number])
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("ending", "behind", "end"),
    [
        ("<|im_end|>\\n", "", "<|im_end|>"),
        ("<|im_end|>", "", "<|im_end|>"),
        ("\\n<|im_end|>\\n", "", "\n<|im_end|>"),
        ("<|im_end|>\\n", "\\n", "\n<|im_end|>"),  # a part of the end is marked
        ("</answer><|eot_id|>", "", "</answer><|eot_id|>"),
        ("</s>", "", "</s>"),
    ],
)
def test_an_end_that_the_template_does_not_mark_is_trained_and_told(tmp_path, ending, behind, end):
    tokenizer, dataset = load(tmp_path, marked("<|im_start|>", ending, behind=behind), TWO, ONE)
    assert trained(tokenizer, dataset.examples[0]) == [f"fox{end}", f"dog{end}"]
    assert trained(tokenizer, dataset.examples[1]) == [f"fox{end}"]
    (note,) = data_notes(dataset, one_example_per_answer=False)
    missing = end.removeprefix("\n" if behind else "")
    where = f"{tmp_path / 'rows.jsonl'}:1, {missing!r}"
    assert note == (
        "warning: the chat template's {% generation %} leaves out the end of the turn in 2 rows, as at "
        f"{where}; it is trained on all the same"
    )
    token = next(text for text in ("<|im_end|>", "<|eot_id|>", "</s>") if text in end)
    assert tokenizer.encode(token)[0] in tokenizer.eos_ids, "generation stops at it"


def test_the_marks_alone_are_trained_where_they_are_to_be_and_equal_transformers(tmp_path):
    source = marked("<|im_start|>", "<|im_end|>\\n")
    _, dataset = load(tmp_path, source, TWO, train_on_turn_ends=False)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    expected = theirs.apply_chat_template(TWO[:4], return_assistant_tokens_mask=True, return_dict=True)
    assert dataset.examples[0].ids.tolist() == expected["input_ids"]
    assert dataset.examples[0].trained.tolist() == [flag == 1 for flag in expected["assistant_masks"]]
    (note,) = data_notes(dataset, one_example_per_answer=False)
    assert note.startswith("warning: the end of a turn is not trained on in 1 row, as at ")


def test_ids_are_transformers_whether_ends_are_marked(tmp_path):
    _, dataset = load(tmp_path, marked("<|im_start|>", "<|im_end|>\\n"), TWO)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert dataset.examples[0].ids.tolist() == theirs.apply_chat_template(TWO, return_dict=True)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-bos", "metaspace"])
@pytest.mark.parametrize("source", [marked("", "</s>"), marked("", "</s>").replace("'\\n'", "': '")])
def test_a_token_that_begins_in_the_header_and_holds_the_answer_is_trained_as_in_transformers(tmp_path, kind, source):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", kind, source))
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": TWO})
    (example,) = load_examples(rows, tokenizer, max_length=512, train_on_turn_ends=False).examples
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    expected = theirs.apply_chat_template(TWO, return_assistant_tokens_mask=True, return_dict=True)
    assert example.ids.tolist() == expected["input_ids"]
    assert example.trained.tolist() == [flag == 1 for flag in expected["assistant_masks"]]


@pytest.mark.parametrize("template", ["CHATML", "CHATML_MARKED", "LLAMA3", "MISTRAL", "FINAL_EOS", "BLOCKS"])
def test_nothing_is_told_where_every_end_is_trained(tmp_path, template):
    _, dataset = load(tmp_path, getattr(templates, template), TWO)
    assert data_notes(dataset, one_example_per_answer=False) == []


@pytest.mark.parametrize(
    "template", ["QWEN25", "QWEN3", "QWEN3_THINKING", "DEEPSEEK_V3", "R1_DISTILL", "LLAMA31", "KIMI_K2"]
)
def test_nothing_is_told_of_published_templates(tmp_path, template):
    _, dataset = load(tmp_path, getattr(published, template), TWO)
    assert data_notes(dataset, one_example_per_answer=False) == []


def test_an_end_of_another_kind_is_told_where_it_is_not_trained(tmp_path):
    source = marked("<|im_start|>", "<|im_end|>").replace(
        "{{ '<|im_end|>' }}{% endfor %}", "{{ '<|im_end|>' if m.content != 'dog' else '<the end>' }}{% endfor %}"
    )
    tokenizer, dataset = load(tmp_path, source, chat("a", "dog", "b", "fox"), chat("a", "dog"))
    assert trained(tokenizer, dataset.examples[0]) == ["dog", "fox<|im_end|>"]
    (note,) = [note for note in data_notes(dataset, one_example_per_answer=False) if "not trained on" in note]
    assert note.startswith("warning: the end of a turn is not trained on in 2 rows, as at ")
    assert "'<the end><|im_start|>user" in note


def test_the_end_behind_calls_may_be_another_one_that_ends_generation(tmp_path):
    # As in Llama 3.1: <|eom_id|> behind a call, which generation_config.json names beside <|eot_id|>.
    call = {"role": "assistant", "content": "dog", "name": "call"}
    source = marked("<|im_start|>", "<|eot_id|>").replace(
        "{{ '<|eot_id|>' }}{% endfor %}", "{{ '<|im_end|>' if m.name else '<|eot_id|>' }}{% endfor %}"
    )
    folder = make_folder(tmp_path / "model", template=source)
    ids = [Tokenizer.from_folder(folder).encode(text)[0] for text in ("<|eot_id|>", "<|im_end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = Tokenizer.from_folder(folder)
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": [*chat("a"), call, *chat("b", "fox")]})
    (example,) = load_examples(rows, tokenizer, max_length=512).examples
    assert trained(tokenizer, example) == ["dog<|im_end|>", "fox<|eot_id|>"]


def test_a_turn_of_several_marked_spans_ends_once(tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.thinking }}{% endgeneration %}|"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>{% endfor %}"
    )
    answers = [{"role": "assistant", "content": text, "thinking": "why"} for text in ("fox", "dog")]
    tokenizer, dataset = load(tmp_path, source, [*chat("a"), answers[0], *chat("b"), answers[1]])
    assert trained(tokenizer, dataset.examples[0]) == ["why", "fox<|im_end|>", "why", "dog<|im_end|>"]
    (note,) = data_notes(dataset, one_example_per_answer=False)
    assert "leaves out the end of the turn in 1 row" in note


@pytest.mark.parametrize("source", [templates.PLAIN, marked("### ", "\\n")])
def test_plain_ends_are_told_where_eos_stands_behind_the_last_turn_alone(tmp_path, source):
    tokenizer, dataset = load(tmp_path, source, ONE, TWO, TWO)
    said = [[text.strip(" ") for text in trained(tokenizer, example)] for example in dataset.examples]
    assert said[:2] == [["fox\n</s>"], ["fox\n", "dog\n</s>"]]
    notes = data_notes(dataset, one_example_per_answer=False)
    (note,) = [note for note in notes if "plain text" in note]
    assert note.startswith("warning: the chat template ends turns by plain text in 2 rows, as at ")
    assert f"{tmp_path / 'rows.jsonl'}:2, 'fox\\n': EOS is trained on behind the last turn alone" in note
    assert "--one-example-per-answer does so behind each" in note


def test_one_example_per_answer_learns_eos_behind_each(tmp_path):
    tokenizer, dataset = load(tmp_path, templates.PLAIN, TWO, one_example_per_answer=True)
    assert [trained(tokenizer, example) for example in dataset.examples] == [["fox\n</s>"], ["dog\n</s>"]]
    assert data_notes(dataset, one_example_per_answer=True) == []
