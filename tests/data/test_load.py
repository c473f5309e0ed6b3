import random

import pytest
from transformers import PreTrainedTokenizerFast

from qsharded.data import Tokenizer, load_examples
from qsharded.data.notes import data_notes
from tests.data import templates
from tests.data.folders import chat, make_folder, write_rows

KINDS = ["byte-level", "byte-level-bos", "metaspace"]


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_folder(make_folder(tmp_path / "model", "byte-level-bos", templates.CHATML))


def load(tmp_path, tokenizer, *rows, max_length=512, **options):
    return load_examples(write_rows(tmp_path / "rows.jsonl", *rows), tokenizer, max_length=max_length, **options)


def trained_text(tokenizer, example):
    return tokenizer.decode(example.ids[example.trained].tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_marked_chats_have_the_ids_and_the_mask_of_transformers(tmp_path, kind, seed):
    folder = make_folder(tmp_path / "model", kind, templates.CHATML_MARKED)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    rng = random.Random(seed)
    words = ["the", "quick  brown", "fox\n\njumps", "é👩‍👧", "2+2?", "assistant", "<|im_end"]
    chats = [
        chat(*(" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(2 * rng.randint(1, 3))))
        for _ in range(5)
    ]
    dataset = load(tmp_path, Tokenizer.from_folder(folder), *({"messages": messages} for messages in chats))
    for messages, example in zip(chats, dataset.examples, strict=True):
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert example.ids.tolist() == expected["input_ids"]
        assert example.trained.tolist() == [flag == 1 for flag in expected["assistant_masks"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_the_same_whether_a_template_marks_its_turns(tmp_path, kind):
    row = {"messages": chat("the dog", "it rests.", "and é?", "of course!", system="be kind")}
    marked, plain = (
        load(tmp_path, Tokenizer.from_folder(make_folder(tmp_path / name, kind, getattr(templates, name))), row)
        for name in ("CHATML_MARKED", "CHATML")
    )
    assert plain.examples[0].ids.tolist() == marked.examples[0].ids.tolist()
    assert plain.examples[0].trained.tolist() == marked.examples[0].trained.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("CHATML", "it rests.<|im_end|>4<|im_end|>"),
        ("LLAMA3", "it rests.<|eot_id|>4<|eot_id|>"),
        ("MISTRAL", "it rests.</s> 4</s>"),
    ],
)
def test_what_is_trained_on(tmp_path, kind, name, trained):
    folder = make_folder(tmp_path / "model", kind, getattr(templates, name))
    tokenizer = Tokenizer.from_folder(folder)
    (example,) = load(tmp_path, tokenizer, {"messages": chat("the dog?", "it rests.", "2+2?", "4")}).examples
    assert trained_text(tokenizer, example).lstrip() == trained
    assert example.trained[-1] or name == "CHATML", "all but a line feed behind the last turn"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "the dog\n\nquick"}, {"from": "gpt", "value": "rests"}]},
        {"instruction": "the dog", "input": "quick", "output": "rests"},
        {"prompt": chat("the dog\n\nquick"), "completion": [{"role": "assistant", "content": "rests"}]},
    ],
)
def test_chats_of_every_shape_are_alike(tmp_path, tokenizer, row):
    expected = load(tmp_path, tokenizer, {"messages": chat("the dog\n\nquick", "rests")}).examples[0]
    (example,) = load(tmp_path, tokenizer, row).examples
    assert example.ids.tolist() == expected.ids.tolist()
    assert example.trained.tolist() == expected.trained.tolist()
    assert trained_text(tokenizer, example) == "rests<|im_end|>"


def test_earlier_answers_of_a_prompt_are_not_trained_on(tmp_path, tokenizer):
    row = {"prompt": chat("a", "fox", "b"), "completion": [{"role": "assistant", "content": "dog"}]}
    (example,) = load(tmp_path, tokenizer, row).examples
    assert trained_text(tokenizer, example) == "dog<|im_end|>"


def test_a_question_at_the_end_is_left_out(tmp_path, tokenizer):
    open_end, closed = load(
        tmp_path, tokenizer, {"messages": chat("a", "b", "c")}, {"messages": chat("a", "b")}
    ).examples
    assert open_end.ids.tolist() == closed.ids.tolist()


def test_train_on_all(tmp_path, tokenizer):
    rows = [{"messages": chat("a", "b", "c")}, {"prompt": "fox ", "completion": "dog"}]
    talk, completion = load(tmp_path, tokenizer, *rows, train_on="all").examples
    assert tokenizer.decode(talk.ids.tolist()) == tokenizer.render(rows[0]["messages"])
    assert talk.trained.all()
    assert completion.trained[1:].all()
    assert tokenizer.decode(completion.ids.tolist()) == "<s>fox dog</s>"


def test_a_template_without_end_of_turn_gets_eos(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=templates.PLAIN))
    (example,) = load(tmp_path, tokenizer, {"messages": chat("a", "dog")}).examples
    assert tokenizer.decode(example.ids.tolist()) == "user: a\nassistant: dog\n</s>"
    assert example.ids[example.trained][-1] == tokenizer.eos_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the dog\n", "<s>the dog\n", "<s>the dog\n</s>"])
def test_text_has_one_bos_if_any_and_one_eos(tmp_path, kind, text):
    folder = make_folder(tmp_path / "model", kind)
    tokenizer, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    (example,) = load(tmp_path, tokenizer, {"text": text}).examples
    body = text.removeprefix("<s>").removesuffix("</s>")
    if not text.startswith("<s>"):
        assert example.ids.tolist() == [*theirs(body)["input_ids"], theirs.eos_token_id]
    has_bos = text.startswith("<s>") or kind != "byte-level"
    assert example.ids.tolist().count(theirs.bos_token_id) == has_bos
    assert example.ids.tolist().count(theirs.eos_token_id) == 1
    assert example.ids[-1] == theirs.eos_token_id
    assert example.trained[1:].all()
    assert tokenizer.decode(example.ids.tolist(), skip_special_tokens=True).lstrip() == body


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the dog:", " rests"),
        ("the dog: ", "rests"),  # the space and "rests" would be one token
        ("the do", "g rests"),
        ("the dog\n", "\nrests"),
        ("", "rests"),
        ("the dog:", " rests</s>"),
        ("<s>the dog:", " rests"),
    ],
)
def test_a_completion_is_trained_on_behind_what_generation_will_be_given(tmp_path, kind, prompt, completion):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", kind))
    (example,) = load(tmp_path, tokenizer, {"prompt": prompt, "completion": completion}).examples
    given = tokenizer.encode(prompt)
    if tokenizer.adds_bos and not prompt.startswith("<s>"):
        given = [tokenizer.bos_id, *given]
    assert example.ids[: len(given)].tolist() == given
    assert not example.trained[: len(given)].any()
    assert example.trained[len(given) :].all()
    assert example.ids.tolist().count(tokenizer.eos_id) == 1
    assert example.ids[-1] == tokenizer.eos_id
    whole = tokenizer.decode(example.ids[:-1].tolist()).replace("<s> ", "<s>").removeprefix("<s>")
    assert whole == (prompt + completion).removeprefix("<s>").removesuffix("</s>")


def test_overlong_rows_are_counted_and_dropped_or_cut(tmp_path, tokenizer):
    rows = [{"text": "the dog " * 40}, {"text": "fox"}, {"prompt": "the dog " * 40, "completion": "a"}]
    dropped = load(tmp_path, tokenizer, *rows, max_length=16)
    assert [tokenizer.decode(example.ids.tolist()) for example in dropped.examples] == ["<s>fox</s>"]
    assert (dropped.dropped, dropped.truncated) == (2, 0)
    cut = load(tmp_path, tokenizer, *rows, max_length=16, overlong="truncate")
    whole = load(tmp_path, tokenizer, rows[0])
    assert cut.examples[0].ids.tolist() == whole.examples[0].ids[:16].tolist()
    assert [len(example) for example in cut.examples] == [16, len(dropped.examples[0])]
    assert (cut.dropped, cut.truncated) == (1, 1), "a cut that leaves nothing to learn drops the row"


def test_a_row_of_just_the_maximum_length_stays(tmp_path, tokenizer):
    length = len(load(tmp_path, tokenizer, {"text": "the quick dog"}).examples[0])
    dataset = load(tmp_path, tokenizer, {"text": "the quick dog"}, {"text": "a"}, max_length=length)
    assert (len(dataset.examples), dataset.dropped) == (2, 0)
    dataset = load(tmp_path, tokenizer, {"text": "the quick dog"}, {"text": "a"}, max_length=length - 1)
    assert (len(dataset.examples), dataset.dropped) == (1, 1)


def test_blank_texts_are_counted_and_left_out(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, {"text": ""}, {"text": "fox"}, {"text": " \n"})
    assert (len(dataset.examples), dataset.empty) == (1, 2)


def test_more_rows_than_are_encoded_at_once_keep_their_order(tmp_path, tokenizer):
    rows = [{"text": f"fox {number}"} for number in range(1100)]
    examples = load(tmp_path, tokenizer, *rows).examples
    assert [tokenizer.decode(example.ids[1:-1].tolist()) for example in examples] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": chat("a")}, "no message of the assistant to learn"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        ({"prompt": "a"}, "fit no known format"),
        (
            {"prompt": "a", "completion": "b", "messages": chat("a", "b")},
            r"fit several formats \(messages, prompt-completion\)",
        ),
        ({"text": "fox \ud83d"}, "half of a surrogate pair stands alone behind 'fox '"),
        ({"messages": chat("a", "\udc00")}, "half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path, tokenizer, row, reason):
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{reason}"):
        load(tmp_path, tokenizer, {"text": "fox"}, row)


def test_a_row_of_eos_alone_teaches_nothing(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the row has no token to learn"):
        load(tmp_path, tokenizer, {"text": "</s>"})


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=templates.MISTRAL))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template refuses .*roles must alternate"):
        load(tmp_path, tokenizer, {"messages": chat("a", "b")[::-1]})


@pytest.mark.parametrize("row", [{"messages": chat("a", "b")}, {"instruction": "a", "output": "b"}])
def test_chats_without_a_template(tmp_path, row):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the tokenizer in .* has no default chat template"):
        load(tmp_path, tokenizer, row)


@pytest.mark.parametrize("rows", [[{"text": ""}], [{"text": "the dog " * 40}]])
def test_nothing_to_learn_is_an_error(tmp_path, tokenizer, rows):
    with pytest.raises(ValueError, match=r"rows\.jsonl has no tokens to train on: . rows .* max_length 16"):
        load(tmp_path, tokenizer, *rows, max_length=16)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_length": 1}, "max_length must be at least 2 tokens, got 1"),
        ({"overlong": "split"}, "overlong must be drop or truncate, got 'split'"),
        ({"train_on": "user"}, "train_on must be assistant or all, got 'user'"),
        ({"format": "xml"}, "must be one of auto, .*, got 'xml'"),
    ],
)
def test_arguments_out_of_range(tmp_path, tokenizer, options, reason):
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, tokenizer, {"text": "fox"}, **options)


def test_a_told_format_and_split_are_used(tmp_path, tokenizer):
    write_rows(tmp_path / "val.jsonl", {"text": "fox", "prompt": "a", "completion": "b"})
    (tmp_path / "data").mkdir()
    (tmp_path / "val.jsonl").rename(tmp_path / "data" / "val.jsonl")
    (example,) = load_examples(tmp_path / "data", tokenizer, format="text", max_length=64, split="validation").examples
    assert trained_text(tokenizer, example) == "fox</s>"


def test_too_long_conversations_are_left_out_before_their_turns_are_looked_for(tmp_path, monkeypatch):
    source = "{% for m in messages %}{{ m.content | reverse if not loop.last }}</s>{% endfor %}"
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=source))
    unclear = {"messages": chat("a", "the dog " * 40, "b", "dog " * 40)}
    dataset = load(tmp_path, tokenizer, unclear, {"text": "fox"}, max_length=16)
    assert (len(dataset.examples), dataset.dropped) == (1, 1)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: message 1 of the assistant .* is left out"):
        load(tmp_path, tokenizer, unclear, {"text": "fox"}, max_length=16, overlong="truncate")


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_messages_that_ask_for_training_in_vain_are_told(tmp_path, tokenizer, train_on):
    (user, answer), quiet = chat("the dog", "it rests."), chat("a", "b")
    rows = [{"messages": quiet}, *[{"messages": [user | {"training": True}, answer]}] * 2]
    dataset = load(tmp_path, tokenizer, *rows, train_on=train_on)
    notes = data_notes(dataset, one_example_per_answer=False)
    assert len(notes) == (train_on == "assistant"), "all tokens are trained on: nothing was asked for in vain"
    for note in notes:
        assert note.startswith("warning: training on a message that is not the assistant's, or is in a prompt, is a")
        assert f"{tmp_path / 'rows.jsonl'}:2, message 0: 'user: the dog'" in note.partition(" in 2 rows, as at ")[2]
