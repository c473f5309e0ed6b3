"""What is trained on of conversations with tool calls and reasoning, under the templates of well-known models."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from qsharded.data import Dataset, Tokenizer, load_examples, load_prompts
from qsharded.data.notes import data_notes
from tests.data import published, templates
from tests.data.folders import chat, make_folder, write_rows

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ID = "abcdefghi"
WITH_TOOLS = ["QWEN25", "QWEN3", "QWEN3_THINKING", "DEEPSEEK_V3", "R1_DISTILL", "LLAMA31", "MISTRAL_V3"]
WRITTEN = {
    "QWEN25": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    "QWEN3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    "QWEN3_THINKING": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    "DEEPSEEK_V3": '<calls><call>function<sep>weather\n{"city": "Oslo"}</call></calls></s>',
    "R1_DISTILL": '<calls><call>function<sep>weather\n{"city": "Oslo"}</call></calls></s>',
    "LLAMA31": '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
    "MISTRAL_V3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>',
}
FINAL = {
    "QWEN25": "four<|im_end|>",
    "QWEN3": "<think>\n\n</think>\n\nfour<|im_end|>",
    "QWEN3_THINKING": "\n</think>\n\nfour<|im_end|>",  # its prompt opens the block
    "DEEPSEEK_V3": "four</s>",
    "R1_DISTILL": "four</s>",
    "LLAMA31": "four<|eot_id|>",
    "MISTRAL_V3": " four</s>",
}


def call(arguments=None, name="weather", id=ID):
    arguments = {"city": "Oslo"} if arguments is None else arguments
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **fields):
    return {"role": "assistant", "content": "", "tool_calls": list(calls or [call()])} | fields


def result(content="4", id=ID):
    return {"role": "tool", "content": content, "tool_call_id": id}


def said(content, **fields):
    return {"role": "assistant", "content": content} | fields


def tokenizer_of(tmp_path, template, **settings):
    source = getattr(published, template, None) or getattr(templates, template, template)
    return Tokenizer.from_folder(make_folder(tmp_path / "model", template=source, **settings))


def load(tmp_path, tokenizer, *messages, tools=None, **options):
    rows = [{"messages": each} | ({"tools": tools} if tools else {}) for each in messages]
    return load_examples(write_rows(tmp_path / "rows.jsonl", *rows), tokenizer, max_length=4096, **options)


def trained_runs(tokenizer, example):
    """The text of each unbroken run of trained ids."""
    runs, before = [], False
    for token, trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if trained:
            runs.append([*(runs.pop() if before else []), token])
        before = trained
    return [tokenizer.decode(run) for run in runs]


def trained_texts(tmp_path, template, messages, **options):
    """Of each example of a conversation, the trained texts."""
    tokenizer = tokenizer_of(tmp_path, template)
    dataset = load(tmp_path, tokenizer, messages, **options)
    return [trained_runs(tokenizer, example) for example in dataset.examples]


def rendered_by_transformers(tmp_path, messages, **options):
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    return theirs.apply_chat_template(messages, tokenize=False, **options)


NO_CONTENT = {"empty": {"content": ""}, "null": {"content": None}, "absent": {}}


@pytest.mark.parametrize("template", WITH_TOOLS)
@pytest.mark.parametrize("nothing", NO_CONTENT)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_call_without_content_and_the_final_answer_are_trained_on(tmp_path, template, nothing, tools):
    caller = {"role": "assistant", "tool_calls": [call()]} | NO_CONTENT[nothing]
    messages = [*chat("a"), caller, result(), said("four")]
    (runs,) = trained_texts(tmp_path, template, messages, tools=tools)
    assert runs == [WRITTEN[template], FINAL[template]]


@pytest.mark.parametrize("template", ["QWEN25", "QWEN3", "QWEN3_THINKING"])
@pytest.mark.parametrize("content", ["", "let me look"])
def test_several_calls_with_parallel_answers_are_one_turn(tmp_path, template, content):
    calls = calling(call(), call({"city": "Rome"}, "sun", "ihgfedcba"), content=content)
    (runs,) = trained_texts(
        tmp_path, template, [*chat("a"), calls, result("4"), result("9", "ihgfedcba"), said("four")]
    )
    second = '<tool_call>\n{"name": "sun", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    first = WRITTEN[template].removesuffix("<|im_end|>")
    turn = f"{content}\n" * bool(content) + f"{first}\n{second}"
    assert runs == [turn, FINAL[template]]


@pytest.mark.parametrize("template", [name for name in WITH_TOOLS if name not in ("DEEPSEEK_V3", "R1_DISTILL")])
def test_rounds_of_calls_and_a_later_question(tmp_path, template):
    round_ = [calling(), result()]
    messages = [*chat("a"), *round_, *round_, said("four"), *chat("b"), said("four")]
    (runs,) = trained_texts(tmp_path, template, messages)
    bare = FINAL[template].split("</think>\n\n")[-1]
    assert runs == [WRITTEN[template], WRITTEN[template], bare, FINAL[template]]


@pytest.mark.parametrize("template", ["QWEN3", "QWEN3_THINKING"])
def test_reasoning_between_calls_is_trained_on_with_them(tmp_path, template):
    messages = [*chat("a"), calling(reasoning_content="why"), result(), said("four", reasoning_content="so")]
    (runs,) = trained_texts(tmp_path, template, messages)
    opened = "" if template == "QWEN3_THINKING" else "<think>\n"
    ends = [WRITTEN[template], "four<|im_end|>"]
    assert runs == [f"{opened}{thought}\n</think>\n\n{end}" for thought, end in zip(("why", "so"), ends, strict=True)]


@pytest.mark.parametrize("template", ["QWEN25", "QWEN3", "DEEPSEEK_V3", "R1_DISTILL"])
def test_an_answer_may_follow_an_answer_or_a_call_a_call(tmp_path, template):
    (runs,) = trained_texts(tmp_path, template, [*chat("a", "b"), said("c"), said("four")])
    end = "</s>" if "<|im_end|>" not in FINAL[template] else "<|im_end|>"
    assert runs == [f"b{end}", f"c{end}", FINAL[template]]


@pytest.mark.parametrize("template", ["DEEPSEEK_V3", "R1_DISTILL"])
def test_a_turn_that_cannot_be_told_is_refused_with_advice_that_works(tmp_path, template):
    # A second round of calls has no header and no beginning of its list there.
    opening, second = [*chat("a"), calling(), result()], calling(call({"city": "Rome"}))
    messages = [*opening, second, result("9"), said("four")]
    with pytest.raises(
        ValueError, match=r'rows\.jsonl:1: cannot tell .* message 3 .*--one-example-per-answer.*"weight": 0'
    ):
        trained_texts(tmp_path, template, messages)
    weighted = [*opening, second | {"weight": 0}, result("9"), said("four")]
    assert trained_texts(tmp_path, template, weighted) == [[WRITTEN[template], FINAL[template]]]
    rome = WRITTEN[template].replace("Oslo", "Rome")
    # The prompt behind a tool's answer opens no block; a first one does, and it is closed before the call.
    first = "\n</think>\n\n" * (template == "R1_DISTILL") + WRITTEN[template]
    per_answer = trained_texts(tmp_path, template, messages, one_example_per_answer=True)
    assert per_answer == [[first], [rome], [FINAL[template]]]
    tokenizer = tokenizer_of(tmp_path, template)
    rows = write_rows(tmp_path / "pairs.jsonl", {"prompt": opening, "completion": [second]})
    (example,) = load_examples(rows, tokenizer, max_length=4096).examples
    assert trained_runs(tokenizer, example) == [rome]


@pytest.mark.parametrize("template", WITH_TOOLS)
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize("outer", [True, False])
def test_arguments_are_written_once_as_json(tmp_path, template, arguments, outer):
    one = call(arguments)
    one = one if outer else {"id": ID} | one["function"]
    (runs,) = trained_texts(tmp_path, template, [*chat("a"), calling(one), result(), said("four")])
    assert runs[0] == WRITTEN[template]


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
@pytest.mark.parametrize("template", WITH_TOOLS)
def test_a_call_without_arguments_has_an_empty_object(tmp_path, template, arguments):
    (runs,) = trained_texts(
        tmp_path, template, [*chat("a"), calling({"id": ID, "name": "weather", "arguments": arguments})]
    )
    assert WRITTEN[template].replace('{"city": "Oslo"}', "{}") in runs[0]


def test_text_that_is_no_object_is_refused_where_the_template_needs_one(tmp_path):
    messages = [*chat("a"), calling(call("city=Oslo"))]
    for template in ("QWEN25", "LLAMA31", "MISTRAL_V3"):
        with pytest.raises(
            ValueError, match=r"rows\.jsonl:1: message 1: the arguments of the call of 'weather' are not"
        ):
            trained_texts(tmp_path, template, messages)
    with pytest.raises(ValueError, match=r"must be a JSON object, got '\[1\]'"):
        trained_texts(tmp_path, "QWEN25", [*chat("a"), calling(call("[1]"))])
    assert "city=Oslo" in trained_texts(tmp_path, "DEEPSEEK_V3", messages)[0][0]


def test_a_template_that_looks_into_the_object_gets_one(tmp_path):
    # As Qwen3-Coder and GLM write parameters; text comes out there too, but not as parameters.
    source = (
        "{% for m in messages %}{{ m.role + ':' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}<{{ f.name }}>"
        "{% if f.arguments is mapping %}{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}"
        "{% else %}{{ f.arguments }}{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert trained_texts(tmp_path, source, [*chat("a"), calling(call('{"city": "Oslo"}'))]) == [
        ["<weather><city>Oslo</s>"]
    ]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_that_would_write_pythons_form_of_the_object_gets_json(tmp_path, tools):
    # The second writes calls only beside tools, as the tool_use templates of some checkpoints do.
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    calls = calls if tools is None else "{% if tools %}" + calls + "{% endif %}"
    source = "{{ tools }}{% for m in messages %}{{ m.role + ':' + m.content }}" + calls + "</s>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert trained_texts(tmp_path, source, [*chat("a"), calling()], tools=tools) == [['weather{"city": "Oslo"}</s>']]


@pytest.mark.parametrize("template", WITH_TOOLS)
@pytest.mark.parametrize(
    "empty", [{"tool_calls": []}, {"tool_calls": None}, {"tool_calls": "[]"}, {"reasoning_content": ""}, {"name": ""}]
)
def test_empty_optional_fields_change_nothing(tmp_path, template, empty):
    plain = chat("a", "<think>\nx\n</think>\n\nb")
    expected = trained_texts(tmp_path, template, plain)
    assert trained_texts(tmp_path, template, [plain[0] | empty, plain[1] | empty]) == expected
    row = {"messages": plain, "tools": []}
    (example,) = load_examples(
        write_rows(tmp_path / "tools.jsonl", row), tokenizer_of(tmp_path, template), max_length=512
    ).examples
    assert [trained_runs(tokenizer_of(tmp_path, template), example)] == expected


UNWRITTEN = [*chat("weather"), calling(), result(), said("four")]


def noted(dataset):
    return [note.split(", as at ") for note in data_notes(dataset, one_example_per_answer=False)]


@pytest.mark.parametrize("template", ["SMOLLM2", "LLAMA30"])
@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("options", [{}, {"train_on": "all"}, {"one_example_per_answer": True}])
def test_calls_that_the_template_does_not_write_are_counted_with_an_example(tmp_path, template, weight, options):
    tokenizer, end = tokenizer_of(tmp_path, template), {"SMOLLM2": "<|im_end|>", "LLAMA30": "<|eot_id|>"}[template]
    messages = [UNWRITTEN[0], calling(weight=weight), *UNWRITTEN[2:]]
    dataset = load(tmp_path, tokenizer, chat("weather", "b"), messages, messages, **options)
    found, example = next(note for note in noted(dataset) if "leaves tool calls" in note[0])
    assert found == "warning: the chat template leaves tool calls out of 2 rows"
    assert example.startswith(f"{tmp_path / 'rows.jsonl'}:2, message 1: 'weather'; answers of nothing else are not")
    if options.get("train_on") != "all":
        learnt = [[text.strip() for text in trained_runs(tokenizer, example)] for example in dataset.examples]
        assert learnt == [["b" + end], ["four" + end], ["four" + end]], "an end alone teaches to end the turn at once"


def test_text_beside_calls_that_are_not_written_is_trained_on(tmp_path):
    messages = [*chat("weather"), calling(content="hm"), result(), said("four")]
    assert trained_texts(tmp_path, "SMOLLM2", messages) == [["hm<|im_end|>", "four<|im_end|>"]]


def test_reasoning_beside_calls_that_are_not_written_is_trained_on(tmp_path):
    source = "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}{{ m.content }}<|im_end|>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    messages = [*chat("weather"), calling(reasoning_content="why"), result(), said("four")]
    assert trained_texts(tmp_path, source, messages) == [["why<|im_end|>", "four<|im_end|>"]]


@pytest.mark.parametrize("options", [{}, {"one_example_per_answer": True}])
def test_rows_of_calls_alone_that_are_not_written_are_left_out(tmp_path, options):
    tokenizer = tokenizer_of(tmp_path, "SMOLLM2")
    dataset = load(tmp_path, tokenizer, chat("a", "b"), UNWRITTEN[:2], **options)
    assert (len(dataset.examples), dataset.empty, dataset.bad) == (1, 1, 0)
    with pytest.raises(
        ValueError, match=r"no tokens to train on: 0 .*, 1 as empty\nwarning: .* leaves tool calls out of 1"
    ):
        load(tmp_path, tokenizer, UNWRITTEN[:2], **options)
    (example,) = load(tmp_path, tokenizer, UNWRITTEN[:2], train_on_empty_answers=True, **options).examples
    assert [text.strip() for text in trained_runs(tokenizer, example)] == ["<|im_end|>"]


def test_nothing_is_learnt_behind_the_last_answer_that_is_written(tmp_path):
    source = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"  # EOS ends its last turn
    messages = [*chat("a", "b", "weather"), calling()]
    tokenizer = tokenizer_of(tmp_path, source)
    (example,) = load(tmp_path, tokenizer, messages).examples
    assert tokenizer.decode(example.ids.tolist()).endswith(f"assistant: b{tokenizer.decode([tokenizer.eos_id])}")


@pytest.mark.parametrize("prompts", [False, True])
def test_an_answer_of_a_tool_that_the_template_leaves_out_is_counted(tmp_path, prompts):
    source = published.QWEN3.replace("'\\n<tool_response>\\n' + content + '\\n</tool_response>'", "'?'")
    assert source != published.QWEN3
    tokenizer = tokenizer_of(tmp_path, source)
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": [*chat("4"), calling(), result(), said("4")]})
    dataset = Dataset([])
    if prompts:
        load_prompts(rows, tokenizer, counted=dataset)
    else:
        dataset = load_examples(rows, tokenizer, max_length=512)
    ((found, example),) = noted(dataset)
    assert found == "warning: the chat template leaves tools' answers out of 1 row"
    assert example.startswith(f"{rows}:1, message 2: '4', which answers are trained on without; take a model")


def test_arguments_that_the_template_leaves_out_are_counted(tmp_path):
    source = published.QWEN25.replace("call.arguments | tojson", "'{}'")
    dataset = load(tmp_path, tokenizer_of(tmp_path, source), [*chat("a"), calling()])
    ((found, example),) = noted(dataset)
    assert found == "warning: the chat template leaves arguments of tool calls out of 1 row"
    assert "rows.jsonl:1, message 1: \"weather: {'city': 'Oslo'}\"; take a model" in example
    assert len(dataset.examples) == 1


@pytest.mark.parametrize("per_answer", [False, True])
def test_a_call_beside_one_that_is_written_may_be_lost(tmp_path, per_answer):
    source = published.QWEN25.replace("for call in message.tool_calls", "for call in message.tool_calls[:1]")
    tokenizer = tokenizer_of(tmp_path, source)
    messages = [*chat("a"), calling(call(), call(name="sun")), result(), said("four")]
    dataset = load(tmp_path, tokenizer, messages, one_example_per_answer=per_answer)
    runs = [run for example in dataset.examples for run in trained_runs(tokenizer, example)]
    assert runs == [WRITTEN["QWEN25"], FINAL["QWEN25"]]
    assert dataset.omitted["tool calls"].example.endswith("message 1: 'sun'")


@pytest.mark.parametrize("per_answer", [False, True])
def test_answers_of_lost_calls_alone_are_counted_once_a_row(tmp_path, per_answer):
    messages = [*chat("a"), calling(), result(), calling()]
    tokenizer = tokenizer_of(tmp_path, "SMOLLM2")
    dataset = load(tmp_path, tokenizer, messages, chat("a", "b"), one_example_per_answer=per_answer)
    assert [len(dataset.examples), dataset.empty] == [1, 2 if per_answer else 1]
    assert dataset.omitted["tool calls"].rows == 1


def test_an_answer_that_the_template_leaves_out_is_refused(tmp_path):
    source = "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last }}</s>{% endfor %}"
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: message 1 of the assistant \('b'\) is left out"):
        load(tmp_path, tokenizer_of(tmp_path, source), chat("b", "b", "c", "d"), train_on="all")


def test_a_name_that_stands_in_the_id_is_written(tmp_path):
    messages = [*chat("a"), calling(call(id="functions.weather:0")), result(), said("four")]
    expected = [
        ['<think></think><call>functions.weather:0<args>{"city": "Oslo"}<|im_end|>', "<think></think>four<|im_end|>"]
    ]
    assert trained_texts(tmp_path, "KIMI_K2", messages) == expected
    with pytest.raises(
        ValueError, match=r"message 1 calls a tool \('weather'\) of which .* arguments and not the name"
    ):
        trained_texts(tmp_path, "KIMI_K2", [*chat("a"), calling()])


THOUGHT = [*chat("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>\nhow\n</think>\n\nd")]
KEYED = [*chat("a"), said("b", reasoning_content="why"), *chat("c"), said("d", reasoning_content="how")]


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        ("QWEN3", THOUGHT, "message 1: 'why'"),
        ("QWEN3", KEYED, "message 1: 'why'"),
        ("QWEN3_THINKING", THOUGHT, "message 1: 'why'"),
        ("R1_DISTILL", THOUGHT[2:], "message 1: 'how'"),
        ("R1_DISTILL", [*chat("a"), said("why</think>b")], "message 1: 'why'"),
        ("QWEN25", KEYED, "message 1: 'why'"),
        ("LLAMA31", [*chat("a"), said("b", thinking="why")], "message 1: 'why'"),
        ("SMOLLM2", [*chat("a"), said("b", reasoning="b")], "message 1: 'b'"),
        ("QWEN25", [*chat("a"), calling(reasoning_content="why"), result(), said("4")], "message 1: 'why'"),
    ],
)
def test_lost_reasoning_is_counted_with_an_example(tmp_path, template, messages, lost):
    tokenizer = tokenizer_of(tmp_path, template)
    dataset = load(tmp_path, tokenizer, chat("a", "b"), messages, messages)
    assert list(dataset.omitted) == ["reasoning"]
    (note,) = data_notes(dataset, one_example_per_answer=False)
    where = f"{tmp_path / 'rows.jsonl'}:2, {lost}"
    assert note == (
        f"warning: the chat template leaves reasoning out of 2 rows, as at {where}; --one-example-per-answer keeps it"
    )


@pytest.mark.parametrize(("template", "messages"), [("QWEN25", THOUGHT), ("QWEN3", THOUGHT[2:]), ("LLAMA31", THOUGHT)])
def test_nothing_is_counted_where_nothing_is_lost(tmp_path, template, messages):
    assert not load(tmp_path, tokenizer_of(tmp_path, template), messages).omitted


def test_reasoning_that_is_not_to_be_trained_on_is_not_counted(tmp_path):
    messages = [THOUGHT[0], THOUGHT[1] | {"weight": 0}, *THOUGHT[2:]]
    assert not load(tmp_path, tokenizer_of(tmp_path, "QWEN3"), messages).omitted


DEVELOPER = {"role": "developer", "content": "kind"}


@pytest.mark.parametrize(
    ("template", "messages", "tools", "note"),
    [
        (
            "MISTRAL_V3",
            chat("a", "b", system="kind"),
            None,
            ("system messages", "message 0: 'kind'; --one-example-per"),
        ),
        ("DEEPSEEK_V3", [DEVELOPER, *chat("a", "b")], None, ("developer messages", "message 0: 'kind'")),
        ("SMOLLM2", chat("weather", "b"), TOOLS, ("definitions of tools", "'weather'")),
        ("LLAMA31", [*chat("a"), calling(content="hm")], TOOLS, ("text beside tool calls", "message 1: 'hm'")),
    ],
)
def test_other_losses_are_counted_with_an_example(tmp_path, template, messages, tools, note):
    dataset = load(tmp_path, tokenizer_of(tmp_path, template), messages, tools=tools)
    (found,) = data_notes(dataset, one_example_per_answer=False)
    where = tmp_path / "rows.jsonl"
    assert found.startswith(f"warning: the chat template leaves {note[0]} out of 1 row, as at {where}:1, {note[1]}")


PER_ANSWER = {
    "QWEN3": ["<think>\nwhy\n</think>\n\nb<|im_end|>", "<think>\nhow\n</think>\n\nd<|im_end|>"],
    "QWEN3_THINKING": ["why\n</think>\n\nb<|im_end|>", "how\n</think>\n\nd<|im_end|>"],
    "R1_DISTILL": ["why\n</think>\n\nb</s>", "how\n</think>\n\nd</s>"],
    "QWEN25": ["<think>\nwhy\n</think>\n\nb<|im_end|>", "<think>\nhow\n</think>\n\nd<|im_end|>"],
    "MISTRAL_V3": [" <think>\nwhy\n</think>\n\nb</s>", " <think>\nhow\n</think>\n\nd</s>"],
    "LLAMA31": ["<think>\nwhy\n</think>\n\nb<|eot_id|>", "<think>\nhow\n</think>\n\nd<|eot_id|>"],
}


@pytest.mark.parametrize("messages", [THOUGHT, KEYED], ids=["in the content", "by a key"])
@pytest.mark.parametrize("template", PER_ANSWER)
@pytest.mark.parametrize("system", [None, "kind"])
def test_one_example_per_answer_keeps_reasoning_behind_the_prompt_of_generation(tmp_path, template, messages, system):
    tokenizer = tokenizer_of(tmp_path, template)
    messages = chat(system=system) + messages
    dataset = load(tmp_path, tokenizer, messages, one_example_per_answer=True)
    assert not dataset.omitted
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number, answer, example in zip(answers, PER_ANSWER[template], dataset.examples, strict=True):
        prompt = rendered_by_transformers(tmp_path, messages[:number], add_generation_prompt=True)
        assert tokenizer.decode(example.ids.tolist()) == prompt + answer
        assert trained_runs(tokenizer, example) == [answer]
        assert example.ids[~example.trained].tolist() == tokenizer.encode(prompt)


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        ("R1_DISTILL", said("b"), "\n</think>\n\nb</s>"),
        ("R1_DISTILL", said("why</think>b"), "why</think>b</s>"),
        ("R1_DISTILL", said("<think>why</think> b"), "why</think> b</s>"),
        ("R1_DISTILL", calling(reasoning="why"), f"why\n</think>\n\n{WRITTEN['R1_DISTILL']}"),
        ("QWEN25", calling(thinking="why"), f"<think>\nwhy\n</think>\n\n{WRITTEN['QWEN25']}"),
        ("LLAMA31", calling(thinking="why"), f"<think>\nwhy\n</think>\n\n{WRITTEN['LLAMA31']}"),
        ("KIMI_K2", said("b", reasoning="why"), "<think>why</think>b<|im_end|>"),
        ("THINKING_PROMPT", said("<think>\nwhy\n</think>\n\nb"), "why\n</think>\n\nb</s>"),
        ("CHATML_MARKED", said("b"), "b<|im_end|>"),
    ],
)
def test_an_answer_as_generation_gives_it(tmp_path, template, answer, expected):
    assert trained_texts(tmp_path, template, [*chat("a"), answer], one_example_per_answer=True) == [[expected]]


def test_one_example_for_each_answer_that_is_trained_on(tmp_path):
    messages = [*chat("a"), said("b", weight=0), *chat("c"), calling(), result(), said("four"), *chat("e")]
    runs = trained_texts(tmp_path, "QWEN3", messages, one_example_per_answer=True)
    assert runs == [["<think>\n\n</think>\n\n" + WRITTEN["QWEN3"]], [FINAL["QWEN3"]]]


def test_an_answer_before_any_question(tmp_path):
    runs = trained_texts(tmp_path, "QWEN25", [said("hello"), *chat("a", "b")], one_example_per_answer=True)
    assert runs == [["hello<|im_end|>"], ["b<|im_end|>"]]


def test_a_prompt_that_differs_in_white_space_alone(tmp_path):
    source = published.SMOLLM2.replace("assistant\\n' }}{%- endif %}", "assistant\\n\\n' }}{%- endif %}")
    assert trained_texts(tmp_path, source, chat("a", " b"), one_example_per_answer=True) == [["b<|im_end|>"]]


def test_a_prompt_that_no_answer_follows_is_refused(tmp_path):
    source = published.SMOLLM2.replace("<|im_start|>assistant", "<|im_start|>bot")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: the chat template's prompt for the assistant's message 1 is no"
    ):
        trained_texts(tmp_path, source, chat("a", "b"), one_example_per_answer=True)


def test_a_template_that_always_writes_a_header_is_refused_per_answer_too(tmp_path):
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}assistant:"
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template ends a conversation by '</s>assistant:'"):
        trained_texts(tmp_path, source, chat("a", "b"), one_example_per_answer=True)


def test_one_example_per_answer_does_not_go_with_all_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"one example per answer .* does not go with train_on 'all'"):
        trained_texts(tmp_path, "QWEN3", THOUGHT, one_example_per_answer=True, train_on="all")


def test_exact_match_prompts_take_calls_in_the_templates_form(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "QWEN25")
    messages = [*chat("a"), calling(call('{"city": "Oslo"}')), result(), said("four")]
    (prompt,) = load_prompts(write_rows(tmp_path / "rows.jsonl", {"messages": messages}), tokenizer)
    fitted = [*chat("a"), calling(), *messages[2:3]]
    expected = rendered_by_transformers(tmp_path, fitted, add_generation_prompt=True)
    assert tokenizer.decode(prompt.ids) == expected
    assert json.dumps({"city": "Oslo"}) in expected


def test_the_text_of_markers_may_stand_in_a_row(tmp_path):
    dataset = load(
        tmp_path,
        tokenizer_of(tmp_path, "QWEN3"),
        [*chat("qmark0z qmark1z qmarkq2z", THOUGHT[1]["content"]), *THOUGHT[2:]],
    )
    assert dataset.omitted["reasoning"].rows == 1
