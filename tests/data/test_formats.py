import json

import pytest

from qsharded.data.columns import refuse_misspelt
from qsharded.data.formats import FORMATS, Conversation, PromptCompletion, Text, parse_row

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
BOTH = Conversation([USER, ANSWER], [False, True])


@pytest.mark.parametrize(
    ("name", "row", "shape"),
    [
        ("messages", {"messages": [USER, ANSWER], "id": 3}, BOTH),
        ("messages", {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, BOTH),
        ("conversations", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, BOTH),
        ("conversations", {"conversations": [USER, ANSWER]}, BOTH),
        (
            "conversations",
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]},
            Conversation([SYSTEM, USER], [False, False]),
        ),
        ("conversations", {"conversations": [USER], "system": "s"}, Conversation([SYSTEM, USER], [False, False])),
        ("alpaca", {"instruction": "a", "output": "b"}, BOTH),
        ("alpaca", {"instruction": "a", "input": "  ", "output": "b"}, BOTH),
        ("alpaca", {"instruction": "a", "input": None, "output": "b"}, BOTH),
        (
            "alpaca",
            {"instruction": "a", "input": "i", "output": "b", "system": "s"},
            Conversation([SYSTEM, {"role": "user", "content": "a\n\ni"}, ANSWER], [False, False, True]),
        ),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, PromptCompletion("a", "b")),
        (
            "prompt-completion",
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            Conversation([USER, ANSWER, USER, ANSWER], [False, False, False, True]),
        ),
        ("text", {"text": "a"}, Text("a")),
        ("text", {"text": "a", "prompt": "b", "completion": None}, Text("a")),
    ],
)
def test_shapes_are_detected_or_told(name, row, shape):
    assert parse_row(row) == shape
    assert parse_row(row, name) == shape


def test_a_told_format_settles_what_detection_cannot():
    row = {"instruction": "a", "input": "", "output": "b", "prompt": "c", "completion": "d", "text": "e"}
    with pytest.raises(ValueError, match=r"fit several formats \(alpaca, prompt-completion\): .*--dataset-format"):
        parse_row(row)
    assert parse_row(row, "prompt-completion") == PromptCompletion("c", "d")
    assert parse_row(row, "alpaca") == BOTH


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, BOTH),  # as in the original Alpaca
        ({"messages": [USER, ANSWER]}, BOTH),
        ({"prompt": "a", "completion": "b"}, PromptCompletion("a", "b")),
    ],
)
def test_text_beside_a_structured_shape_is_its_rendering(fields, shape):
    assert parse_row(fields | {"text": "c"}) == shape
    assert parse_row(fields | {"text": "c"}, "text") == Text("c")


def test_message_fields_reach_the_template_but_not_nulls_or_weights():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    row = {
        "messages": [
            USER | {"name": "Ann", "weight": 0},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "4", "tool_call_id": None},
            ANSWER | {"weight": 0},
            ANSWER | {"weight": 1.0, "reasoning_content": "r"},
        ],
        "tools": '[{"name": "f"}]',
    }
    assert parse_row(row) == Conversation(
        [
            USER | {"name": "Ann"},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "4"},
            ANSWER,
            ANSWER | {"reasoning_content": "r"},
        ],
        [False, True, False, False, True],
        [{"name": "f"}],
    )


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [CALL]),
        ("tool_calls", [CALL["function"]]),
        ("tool_calls", json.dumps([CALL])),
        ("function_call", CALL["function"]),
    ],
)
def test_tool_calls_of_every_shape_are_alike(field, value):
    assert parse_row({"messages": [USER, {"role": "assistant", field: value}]}).messages == [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
    ]


def test_a_call_keeps_its_id_wherever_it_stands():
    for value in (CALL | {"id": "x"}, CALL["function"] | {"id": "x"}):
        (_, message) = parse_row({"messages": [USER, {"role": "assistant", "tool_calls": [value]}]}).messages
        assert message["tool_calls"] == [CALL | {"id": "x"}]


def test_fields_that_say_nothing_are_dropped():
    empty = {"tool_calls": [], "name": "", "reasoning_content": "", "function_call": {}, "tool_call_id": None}
    row = {"messages": [USER | empty, ANSWER | empty | {"prefix": False}], "tools": []}
    assert parse_row(row) == Conversation([USER, ANSWER | {"prefix": False}], [False, True])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"tool_calls": "nope"}, r"messages\[0\].tool_calls is text, but not JSON"),
        ({"tool_calls": {"name": "f"}}, r"tool_calls must be a list of tool calls, got dict"),
        ({"tool_calls": ["f"]}, r"tool_calls\[0\] must be an object with name and arguments, got 'f'"),
        ({"tool_calls": [{"function": "f"}]}, r"tool_calls\[0\] must be an object with name and arguments, got 'f'"),
        ({"tool_calls": [{"arguments": {}}]}, r"tool_calls\[0\] must name a function, got name None"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, r"arguments must be an object or its JSON, got \[1\]"),
        ({"tool_calls": [{"name": "f", "parameters": {}}]}, r"has parameters; a call's values .* as arguments"),
        ({"content": "a", "role": "user", "tool_calls": [CALL]}, r"role user; only the assistant calls tools"),
        ({"content": "a", "reasoning": ["b"]}, r"reasoning of messages\[0\] must be text, got list"),
    ],
)
def test_malformed_calls_and_reasoning(message, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row({"messages": [{"role": "assistant"} | message]})


def test_parts_of_text_are_joined():
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert parse_row(row).messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "fit no known format .*; the row has no fields"),
        (
            {"prompt": "a", "reply": "b"},
            "fit no known format .*prompt.*completion.*; the row has prompt, reply; --datas",
        ),
        ({"text": None, "id": 1}, "the row has id"),
        ({"messages": []}, "messages is empty"),
        ({"conversations": []}, "conversations is empty"),
        ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
        ({"messages": "hello"}, "messages must be a list of messages, got str"),
        ({"messages": {"role": "user"}}, "messages must be a list of messages, got dict"),
        ({"messages": [USER, "hi"]}, r"messages\[1\] must be an object, got str"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has no role"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"messages\[0\] has the unknown role 'wizard'; known are"),
        ({"messages": [{"role": 3, "content": "a"}]}, r"messages\[0\] has the unknown role 3"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\] has the unknown role \['user'\]"),
        ({"messages": [USER, {"role": "assistant", "contents": "b"}]}, r"messages\[1\] has no content"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\] has no content"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\] has no value"),
        ({"messages": [{"role": "user", "content": 5}]}, r"content of messages\[0\] must be text, got int: 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\] has a part of type image"),
        ({"text": 3.5}, r"text must be text, got float: 3\.5"),
        ({"prompt": "a", "completion": ["b"]}, "prompt and completion must both be text or .*, got str and list"),
        ({"instruction": "a", "output": ["b"]}, r"output must be text, got list: \['b'\]"),
        ({"instruction": "a", "input": 1, "output": "b"}, "input must be text, got int: 1"),
        ({"messages": [USER], "tools": "{"}, "tools is text, but not JSON"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "the row holds 'images'; only text can be learned"),
        ({"text": "a", "image": {"bytes": "x"}}, "the row holds 'image'"),
        ({"messages": [USER], "tools": [1]}, "tools must be a list of objects"),
    ],
)
def test_malformed_rows(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(row)


def test_a_told_format_with_missing_fields():
    with pytest.raises(ValueError, match="format 'alpaca' needs output; the row has instruction, reply"):
        parse_row({"instruction": "a", "reply": "b"}, "alpaca")


def test_an_unknown_format():
    with pytest.raises(ValueError, match=r"must be one of auto, messages, .*, got 'sharegpt'"):
        parse_row({"text": "a"}, "sharegpt")
    assert set(FORMATS) == {"auto", "messages", "conversations", "alpaca", "prompt-completion", "text"}


@pytest.mark.parametrize("role", ["User", "USER", " user ", "human", "Human", "prompter"])
@pytest.mark.parametrize("answerer", ["Assistant", "gpt", "GPT", "ai", "AI", "bot", "chatbot", "model"])
def test_roles_have_other_names(role, answerer):
    assert parse_row({"messages": [USER | {"role": role}, ANSWER | {"role": answerer}]}) == BOTH


@pytest.mark.parametrize("role", ["tool", "observation", "function", "ipython", "tool_response", "function-result"])
def test_what_a_tool_answers_has_other_names(role):
    (message,) = parse_row({"messages": [{"role": role, "content": "4"}]}).messages
    assert message == {"role": "tool", "content": "4"}


@pytest.mark.parametrize("said", [CALL, CALL["function"], [CALL], json.dumps(CALL), json.dumps([CALL["function"]])])
@pytest.mark.parametrize("role", ["function_call", "tool_call", "tool_calls", "Function-Call"])
def test_a_call_may_be_a_role(said, role):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": role, "value": said}]}
    calls = {"role": "assistant", "tool_calls": [CALL]}
    assert parse_row(row) == Conversation([USER, calls], [False, True])


def test_a_call_that_is_no_json_is_named():
    with pytest.raises(ValueError, match=r"conversations\[0\]\.tool_calls\[0\] must be an object .*, got 'f\(1\)'"):
        parse_row({"conversations": [{"from": "function_call", "value": "f(1)"}]})


@pytest.mark.parametrize(
    "messages",
    [
        json.dumps([USER, ANSWER]),
        [json.dumps(USER), json.dumps(ANSWER)],
        [{"role": "user", "value": "a"}, {"from": "assistant", "content": "b"}],
        [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}],
        [{"role": "system", "content": None}, USER, ANSWER],
        [{"from": "system", "value": None}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialogue"])
def test_messages_of_every_shape_are_alike(messages, column):
    assert parse_row({column: messages}) == BOTH


@pytest.mark.parametrize("calls", [json.dumps([CALL]), [json.dumps(CALL)], [CALL | {"function": '{"name": "f"}'}]])
def test_calls_may_be_json_in_part(calls):
    (message,) = parse_row({"messages": [{"role": "assistant", "tool_calls": calls}]}).messages
    assert message["tool_calls"][0]["function"]["name"] == "f"


def test_messages_that_begin_as_json_and_are_none_are_named():
    with pytest.raises(ValueError, match="messages is text, but not JSON: Expecting value"):
        parse_row({"messages": "[nope"})


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"question": "a", "answer": "b"}, BOTH),
        ({"query": "a", "response": "b"}, BOTH),
        ({"problem": "a", "solution": "b"}, BOTH),
        ({"instruction": "a", "context": "", "response": "b", "category": "qa"}, BOTH),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            Conversation([{"role": "user", "content": "a\n\nc"}, ANSWER], [False, True]),
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            Conversation([SYSTEM, USER, ANSWER], [False, False, True]),
        ),
        ({"prompt": "a", "response": "b"}, PromptCompletion("a", "b")),
        ({"prompt": [USER], "response": [ANSWER]}, BOTH),
        ({"question": "a", "answer": "b", "text": "c"}, BOTH),
        # a format by its own names is what it was before there were others
        ({"messages": [USER, ANSWER], "prompt": "c", "response": "d", "question": "e"}, BOTH),
        ({"prompt": "a", "completion": "b", "question": "c", "answer": "d"}, PromptCompletion("a", "b")),
    ],
)
def test_columns_have_other_names(row, shape):
    assert parse_row(row) == shape


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b", "response": "c"}, "response and answer could each be output: say which"),
        ({"prompt": "a", "question": "b", "response": "c"}, r"fit several formats \(alpaca, prompt-completion\)"),
    ],
)
def test_columns_that_could_be_several_fields_are_refused(row, reason):
    with pytest.raises(ValueError, match=rf"{reason}.*--dataset-columns"):
        parse_row(row)


@pytest.mark.parametrize(
    ("columns", "row", "shape"),
    [
        ({"prompt": "question", "completion": "answer"}, {"question": "a", "answer": "b"}, PromptCompletion("a", "b")),
        ({"messages": "chat"}, {"chat": [USER, ANSWER], "prompt": "c", "completion": "d"}, BOTH),
        ({"instruction": "q", "output": "a"}, {"q": "a", "a": "b", "messages": "c"}, BOTH),
        ({"instruction": "output", "output": "instruction"}, {"instruction": "b", "output": "a"}, BOTH),
        ({"output": "answer"}, {"question": "a", "answer": "b", "response": "c"}, BOTH),
        ({"text": "body"}, {"body": "a", "messages": [USER]}, Text("a")),
        (
            {"system": "persona"},
            {"persona": "s", "messages": [USER, ANSWER], "conversations": None},
            Conversation([SYSTEM, USER, ANSWER], [False, False, True]),
        ),
        ({"prompt": "q", "completion": "a"}, {"messages": [USER, ANSWER]}, BOTH),  # another dataset of a mixture
    ],
)
def test_columns_can_be_told(columns, row, shape):
    assert parse_row(row, "auto", columns) == shape


def test_a_told_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="the row has prompt and not anwser, which --dataset-columns names"):
        parse_row({"question": "a"}, "auto", {"prompt": "question", "completion": "anwser"})


def test_a_column_that_no_row_has_is_named():
    refuse_misspelt({"q", "i"}, {"instruction": "q", "input": "i"})
    refuse_misspelt(set(), {"prompt": "x", "completion": "y"})  # they are for another dataset
    with pytest.raises(ValueError, match="--dataset-columns input=j: no row has a column 'j'"):
        refuse_misspelt({"q"}, {"instruction": "q", "input": "j"})


@pytest.mark.parametrize("history", [[["c", "d"], ["e", "f"]], '[["c", "d"], ["e", "f"]]'])
def test_the_history_of_alpaca_is_earlier_turns(history):
    row = {"instruction": "a", "input": "", "output": "b", "system": "s", "history": history}
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate("cdef")]
    assert parse_row(row) == Conversation([SYSTEM, *turns, USER, ANSWER], [False, *[False, True] * 3])


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_no_history_is_none(history):
    assert parse_row({"instruction": "a", "output": "b", "history": history}) == BOTH


@pytest.mark.parametrize("history", ["c", ["c"], [["c"]], [["c", "d", "e"]], [["c", 4]], {"c": "d"}])
def test_a_malformed_history_is_refused(history):
    with pytest.raises(ValueError, match=r"history\[0\]"):
        parse_row({"instruction": "a", "output": "b", "history": history})


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(
    ("value", "trained"), [(0, False), (0.0, False), (False, False), (1, True), (1.0, True), (True, True), (None, True)]
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_message_that_is_not_to_be_trained(key, value, trained, column):
    rows = {column: [USER | {key: value}, ANSWER | {key: value}, USER, ANSWER]}
    unheeded = 0 if value else None
    assert parse_row(rows) == Conversation([USER, ANSWER, USER, ANSWER], [False, trained, False, True], None, unheeded)
    completion = {"prompt": [USER], "completion": [ANSWER | {key: value}]}
    assert parse_row(completion) == Conversation([USER, ANSWER], [False, trained])


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", ["0", "1", "false", "true", "", 0.5, -1, 2, [0], float("nan")])
@pytest.mark.parametrize("message", [USER, ANSWER])
def test_what_is_neither_trained_nor_not_is_refused(key, value, message):
    with pytest.raises(ValueError, match=rf"messages\[0\]: {key} must be 0, 1, true or false, got"):
        parse_row({"messages": [message | {key: value}]})


def test_fields_of_learning_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"messages\[1\]: weight 1 and train False contradict each other"):
        parse_row({"messages": [USER, ANSWER | {"train": False, "weight": 1}]})
    assert parse_row({"messages": [USER, ANSWER | {"train": False, "weight": 0}]}).trained == [False, False]


@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_parts_of_a_message_that_are_to_be_trained_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} trains parts of a message, which is not supported"):
        parse_row({"messages": [USER, ANSWER | {key: [{"begin_offset": 0, "end_offset": 1, "train": True}]}]})


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("system", ["s", "t", "", None])
def test_the_rows_system_message_gives_way_to_the_lists_own(column, system):
    first = [SYSTEM | {"content": system}] if system else []
    assert parse_row({column: [USER, ANSWER], "system": system}).messages == [*first, USER, ANSWER]
    assert parse_row({column: [SYSTEM, USER, ANSWER], "system": system}).messages == [SYSTEM, USER, ANSWER]


def test_json_in_a_text_is_no_deeper_than_a_row_may_be():
    with pytest.raises(ValueError, match="messages: not readable: lists and objects in each other"):
        parse_row({"messages": "[" * 100_000})


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(
    ("row", "number"),
    [
        (lambda asks: {"messages": [USER | asks, ANSWER]}, 0),
        (lambda asks: {"system": "kind", "messages": [USER, ANSWER, USER | asks, ANSWER]}, 3),
        (lambda asks: {"prompt": [USER, ANSWER | asks, USER], "completion": [ANSWER]}, 1),
        (lambda asks: {"messages": [USER, ANSWER | asks]}, None),
        (lambda asks: {"prompt": [USER], "completion": [ANSWER | asks]}, None),
    ],
)
def test_a_message_that_asks_for_training_in_vain_is_known(key, row, number):
    assert parse_row(row({key: True})).unheeded == number
    assert parse_row(row({key: False})).unheeded is None
    assert parse_row(row({key: True})).trained == parse_row(row({})).trained
