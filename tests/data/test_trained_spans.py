import random

import pytest

from qsharded.data.chat import ChatTemplate
from qsharded.data.formats import Conversation
from qsharded.data.trained_spans import assistant_spans
from tests.data import templates
from tests.data.folders import SPECIAL, chat

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
# What ends a turn and is trained on with it.
ENDS = {"CHATML": "<|im_end|>", "CHATML_MARKED": "<|im_end|>", "LLAMA3": "<|eot_id|>", "MISTRAL": "</s>", "PLAIN": "\n"}


def trained_texts(source, messages, trained=None, tools=None):
    template = ChatTemplate(source, VARIABLES)
    text = template.render(messages, tools=tools)
    trained = trained or [message["role"] == "assistant" for message in messages]
    spans = assistant_spans(template, Conversation(messages, trained, tools), text, SPECIAL)
    return [text[start:end] for start, end in spans]


def contents(rng, turns):
    words = ["alpha", "beta  two", "gamma\n\ndelta", "<b>x</b>", "naïve 👩‍👩‍👧", "<|im_end", "assistant", "user: a"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(turns)]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("seed", range(8))
def test_each_turn_with_its_end_and_nothing_else(name, seed):
    rng = random.Random(seed)
    messages = chat(*contents(rng, 2 * rng.randint(1, 4)), system=rng.choice([None, "be kind"]))
    lead = " " if name == "MISTRAL" else ""
    expected = [f"{lead}{m['content']}{ENDS[name]}" for m in messages if m["role"] == "assistant"]
    assert trained_texts(getattr(templates, name), messages) == expected


@pytest.mark.parametrize("name", ENDS)
def test_only_trained_messages(name):
    messages = chat("a", "b", "c", "d", "e", "f")
    (text,) = trained_texts(getattr(templates, name), messages, [False, False, False, True, False, False])
    assert text.strip() == f"d{ENDS[name]}".strip()


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "PLAIN"])
def test_the_assistant_may_begin_or_go_on(name):
    messages = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert trained_texts(getattr(templates, name), messages) == [f"a{ENDS[name]}", f"b{ENDS[name]}"]


def test_calls_of_tools_are_turns():
    calls = [{"function": {"name": "f"}}]
    messages = [
        *chat("a"),
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    expected = ['[{"function": {"name": "f"}}]<|eot_id|>', "four<|eot_id|>"]
    assert trained_texts(templates.LLAMA3, messages, tools=[{"name": "f"}]) == expected


def test_a_template_that_drops_earlier_reasoning():
    messages = chat("a", "<think>\nx\n</think>\n\nb", "c", "d", "e", "<think>\ny\n</think>\n\nf")
    # As Qwen3 generates: its prompt ends before the think block.
    expected = ["b<|im_end|>", "d<|im_end|>", "<think>\ny\n</think>\n\nf<|im_end|>"]
    assert trained_texts(templates.THINKING, messages) == expected


def test_a_template_that_writes_an_empty_think_block_last():
    assert trained_texts(templates.THINKING, chat("a", "b", "c", "d")) == [
        "b<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]


def test_turns_between_calls_of_tools_keep_their_reasoning():
    messages = [*chat("a", "<think>x</think>b"), {"role": "tool", "content": "4"}, *chat("", "c")[1:]]
    assert trained_texts(templates.THINKING, messages) == [
        "<think>\nx\n</think>\n\nb<|im_end|>",
        "<think>\n\n</think>\n\nc<|im_end|>",
    ]


@pytest.mark.parametrize("answer", ["b", "<think>x</think>b", "<th", "<think", ""])
def test_a_prompt_that_opens_a_think_block(answer):
    said = answer.split("</think>")[-1]
    assert trained_texts(templates.THINKING_PROMPT, chat("a", answer, "c", "d")) == [f"{said}</s>", "d</s>"]


def test_a_template_that_writes_eos_behind_the_conversation():
    assert trained_texts(templates.FINAL_EOS, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>\n</s>"]


def test_a_template_that_always_writes_a_header_is_refused():
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}assistant:"
    with pytest.raises(ValueError, match="ends a conversation by '</s>assistant:', which is more than the end of"):
        trained_texts(source, chat("a", "b"))


def test_a_turn_that_ends_by_no_special_token_and_changes_when_more_follows():
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content.split('|')[-1] }}\n{% endfor %}"
    )
    assert trained_texts(source, chat("a", "x|b", "c", "y|d")) == ["assistant: b\n", "assistant: y|d\n"]


def test_an_empty_turn_without_any_end():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    assert trained_texts(source, chat("q", "", "Ar", "s")) == ["", "s"]


def template_that_writes(earlier_answer, end="</s>"):
    """A template whose answers read otherwise once more follows."""
    return (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}</s>"
        "{% else %}{{ " + earlier_answer + " }}" + end + "{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize(
    "source",
    [
        template_that_writes("m.content | reverse"),
        template_that_writes("m.content ~ m.content"),
        template_that_writes("'removed'"),
        template_that_writes("m.content | length"),
        template_that_writes("m.content.replace('def', '')"),
        template_that_writes("m.content", end="|"),
        "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        # The space before the content, whose side of the header is known, is there in the last turn only.
        "{{ 'X' if messages | length > 2 }}{% for m in messages %}"
        "{{ ('A:' ~ (' ' if loop.last else '') if m.role == 'assistant' else 'U:') ~ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}",
    ],
)
def test_templates_that_hide_the_turn_are_refused(source):
    with pytest.raises(ValueError, match=r"cannot tell which text of the assistant's message 1 .*\{% generation %\}"):
        trained_texts(source, chat("abc", "def", "ghi", "jkl"))


@pytest.mark.parametrize("trained", [[False, True, False, False], [False, True, False, True]])
def test_marks_that_do_not_fit_the_messages_are_refused(trained):
    unmarked = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + unmarked
    with pytest.raises(ValueError, match="marks 0 spans for 2 assistant messages"):
        trained_texts(source, chat("a", "b", "c", "d"), trained)
