from collections import OrderedDict

import pytest
from jinja2 import Environment
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from qsharded.data.chat import ChatTemplate
from qsharded.data.template_limits import LimitedEnvironment
from tests.data import templates
from tests.data.folders import chat

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"name": "f", "parameters": {"q": "é<&>"}}]
CONVERSATIONS = {
    "question": chat("Hi"),
    "one turn": chat("Hi <b>&\n", " Hello \n"),
    "two turns": chat("a", "b", "c\n\nd", "e", system=" be kind "),
    "open end": chat("a", "b", "c", system="s"),
    "reasoning": chat("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>hm</think>d"),
    "empty answer": chat("a", ""),
    "unicode": chat("日本 👩‍👩‍👧", "naïve e\u0301"),
}
TEMPLATES = [
    "CHATML",
    "CHATML_MARKED",
    "LLAMA3",
    "MISTRAL",
    "THINKING",
    "THINKING_PROMPT",
    "FINAL_EOS",
    "BLOCKS",
    "PLAIN",
]


def rendered_by_transformers(source, messages, **options):
    texts, spans = render_jinja_template([messages], chat_template=source, **VARIABLES, **options)
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("prompt", [False, True])
def test_renders_as_transformers_does(name, messages, prompt):
    source = getattr(templates, name)
    expected, _ = rendered_by_transformers(source, messages, add_generation_prompt=prompt)
    assert ChatTemplate(source, VARIABLES).render(messages, add_generation_prompt=prompt) == expected


def test_renders_tools_and_calls_as_transformers_does():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"q": "é<&>"}}}]
    messages = [*chat("a"), {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "4"}]
    expected, _ = rendered_by_transformers(templates.LLAMA3, messages, tools=TOOLS)
    assert ChatTemplate(templates.LLAMA3, VARIABLES).render(messages, tools=TOOLS) == expected
    assert '"q": "é<&>"' in expected


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_goes_by_its_names(field, read):
    source = "{% for m in messages %}{{ m['" + read + "'] }}|{% endfor %}"
    messages = [{"role": "assistant", "content": "a", field: "why"}]
    expected, _ = rendered_by_transformers(source, messages)
    assert ChatTemplate(source, VARIABLES).render(messages) == "why|"
    if hasattr(chat_template_utils, "_REASONING_FIELDS"):  # older ones leave the names as they are
        assert expected == "why|"


@pytest.mark.parametrize("name", list(CONVERSATIONS)[1:])
def test_generation_spans_are_those_of_transformers(name):
    messages = CONVERSATIONS[name]
    _, expected = rendered_by_transformers(templates.CHATML_MARKED, messages, return_assistant_tokens_mask=True)
    assert ChatTemplate(templates.CHATML_MARKED, VARIABLES).generation_spans(messages) == expected


def test_variables_set_inside_generation_stay_there():
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    expected, _ = rendered_by_transformers(source, chat("a"))
    assert ChatTemplate(source, VARIABLES).render(chat("a")) == expected == "21"


def test_generation_spans_are_found_inside_macros():
    # transformers counts what has been written so far, and inside a macro nothing has.
    source = (
        "{% macro say(text) %}A:{% generation %}{{ text }};{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ say(m.content) if m.role == 'assistant' else 'U:' + m.content }}{% endfor %}"
    )
    template = ChatTemplate(source, VARIABLES)
    text = template.render(chat("a", "bb", "c", "d"))
    assert text == "U:aA:bb;U:cA:d;"
    assert [text[slice(*span)] for span in template.generation_spans(chat("a", "bb", "c", "d"))] == ["bb;", "d;"]


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{% set x %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}{{ x | trim }}", "a"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "a\ufdd0b"),
    ],
)
def test_generation_spans_that_cannot_be_followed_are_refused(source, content):
    with pytest.raises(ValueError, match="spans that the chat template marks cannot be followed"):
        ChatTemplate(source, VARIABLES).generation_spans(chat(content))


@pytest.mark.parametrize(
    ("source", "marks"),
    [("{%- generation -%}a{%- endgeneration -%}", True), ("{# generation #}{{ generation }} endgeneration", False)],
)
def test_knows_whether_a_template_marks_generation(source, marks):
    assert ChatTemplate(source, VARIABLES).marks_generation is marks


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].wrong.deeper }}", "has no attribute 'wrong'"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_says_why(source, reason):
    with pytest.raises(ValueError, match=f"refuses this conversation: .*{reason}"):
        ChatTemplate(source, VARIABLES).render(chat("a"))


@pytest.mark.parametrize("name", ["items", "pop", "clear", "append", "upper", "format", "mro", "__class__", "x", "y"])
def test_attributes_are_those_that_the_sandbox_gives(name: str) -> None:
    """Each twice: the second time whether it is safe is known."""
    plain, ours = ImmutableSandboxedEnvironment(), LimitedEnvironment()
    objects = [list, dict, str, 3, {"x": 1, "append": 2}, {}, OrderedDict(x=1), [], "text", ours.undefined(name="z")]
    for one in objects * 2:
        found = [text_of(environment, one, name) for environment in (plain, ours)]
        assert found[0] == found[1], (one, name)


def text_of(environment: Environment, value: object, name: str) -> str:
    source = "{{ 'a method' if value.NAME is defined and value.NAME is callable else value.NAME }}"
    try:
        return environment.from_string(source.replace("NAME", name)).render(value=value)
    except (SecurityError, UndefinedError) as error:
        return str(error)


def test_a_template_that_is_no_jinja():
    with pytest.raises(ValueError, match=r"chat template is not valid: .*end of template"):
        ChatTemplate("{% if messages %}", VARIABLES)


def test_loop_controls():
    source = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    assert ChatTemplate(source, VARIABLES).render(chat("a", "b", "c")) == "ab"
