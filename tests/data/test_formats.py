import json

import pytest

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
        ({"tool_calls": []}, r"messages\[0\] has no content"),
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
        ({"prompt": "a", "response": "b"}, "fit no known format .*prompt.*completion.*; the row has prompt, response"),
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
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] has no content"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r"conversations\[0\] has no value"),
        ({"messages": [{"role": "user", "content": 5}]}, r"content of messages\[0\] must be text, got int: 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\] has a part of type image"),
        ({"text": 3.5}, r"text must be text, got float: 3\.5"),
        ({"prompt": "a", "completion": ["b"]}, "prompt and completion must both be text or .*, got str and list"),
        ({"instruction": "a", "output": ["b"]}, r"output must be text, got list: \['b'\]"),
        ({"instruction": "a", "input": 1, "output": "b"}, "input must be text, got int: 1"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "the row holds 'images'; only text can be learned"),
        ({"text": "a", "image": {"bytes": "x"}}, "the row holds 'image'"),
        ({"messages": [USER], "tools": "{"}, "tools is not JSON"),
        ({"messages": [USER], "tools": [1]}, "tools must be a list of objects"),
    ],
)
def test_malformed_rows(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(row)


def test_a_told_format_with_missing_fields():
    with pytest.raises(ValueError, match="format 'alpaca' needs output; the row has instruction, response"):
        parse_row({"instruction": "a", "response": "b"}, "alpaca")


def test_an_unknown_format():
    with pytest.raises(ValueError, match=r"must be one of auto, messages, .*, got 'sharegpt'"):
        parse_row({"text": "a"}, "sharegpt")
    assert set(FORMATS) == {"auto", "messages", "conversations", "alpaca", "prompt-completion", "text"}
