"""All turns at once are the turns that are found one by one, and cost about one rendering more."""

import random
from collections import Counter

import pytest

from qsharded.data import turn_places
from qsharded.data.chat import ChatTemplate
from qsharded.data.formats import Conversation
from qsharded.data.turns import TurnFinder, TurnUnclear
from tests.data import published, templates
from tests.data.folders import SPECIAL, chat

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
SOURCES = {
    name: source
    for module in (published, templates)
    for name, source in vars(module).items()
    if name.isupper() and not name.startswith("_") and "generation %}" not in source
}
TEXTS = [
    *(
        "alpha",
        " beta  two ",
        "gamma\n\ndelta",
        "<b>x</b>",
        "<b>x",
        "naïve 👩‍👩‍👧\n",
        "<|im_end",
        "assistant",
        "user: a",
    ),
    *(
        "\n\ntext",
        "<tool_response>\n4\n</tool_response>",
        "what now? /no_think",
        "q0mark0q",
        "",
        "<think>",
        "a</think>b",
    ),
]


def conversation(rng: random.Random) -> Conversation:
    """Of any kind: with reasoning in the content or beside it, calls of tools, roles in no order, blank texts."""
    messages = [{"role": "system", "content": rng.choice(TEXTS)}] if rng.random() < 0.3 else []
    plain, calls = rng.random() < 0.4, rng.random() < 0.4
    for _ in range(rng.randint(1, 5)):
        messages.append({"role": "user", "content": rng.choice(TEXTS[:8] if plain else TEXTS)})
        if calls and rng.random() < 0.6:
            call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
            messages.append({"role": "assistant", "content": rng.choice(["", "so"]), "tool_calls": [call]})
            messages.append({"role": "tool", "content": rng.choice(TEXTS[:4]), "tool_call_id": "abcdefghi"})
        answer = {"role": "assistant", "content": rng.choice(TEXTS[:8] if plain else TEXTS)}
        if not plain and rng.random() < 0.5:
            thought = rng.choice(["why", "\nso\n", "<b>"])
            if rng.random() < 0.5:
                answer["reasoning_content"] = thought
            else:
                answer["content"] = f"<think>{thought}</think>\n\n{answer['content']}"
        messages.append(answer)
    trained = [message["role"] == "assistant" and rng.random() < 0.9 for message in messages]
    return Conversation(messages, [*trained[:-1], True])


@pytest.mark.parametrize("name", SOURCES)
def test_turns_are_those_that_are_found_one_by_one(name: str) -> None:
    template, rng, seen = ChatTemplate(SOURCES[name], VARIABLES), random.Random(name), Counter()
    for _ in range(150):
        talk = conversation(rng)
        try:
            text = template.render(talk.messages)
        except ValueError:  # roles that must alternate, and the like
            continue
        finder = TurnFinder(template, talk, text, SPECIAL)
        try:
            expected = [finder.turn(number) for number, trained in enumerate(talk.trained) if trained]
        except TurnUnclear:
            with pytest.raises(TurnUnclear):
                turn_places.find_turns(template, talk, text, SPECIAL)
            seen["unclear"] += 1
            continue
        assert turn_places.find_turns(template, talk, text, SPECIAL) == expected, talk
        seen["found"] += 1
    assert seen["found"] > 20


@pytest.mark.parametrize(
    "name", ["QWEN3", "QWEN3_THINKING", "QWEN25", "LLAMA30", "MISTRAL", "PLAIN", "THINKING_PROMPT"]
)
def test_the_cost_is_linear_in_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in renderings: a hundred turns take a few of the whole, as ten do."""
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: (rendered.append(len(a[1])), render(*a, **k))[1])
    template = ChatTemplate(SOURCES[name], VARIABLES)
    talk = chat(*(f"some words {number}" for number in range(200)))
    text = render(template, talk)
    whole = Conversation(talk, [message["role"] == "assistant" for message in talk])
    assert len(turn_places.find_turns(template, whole, text, SPECIAL)) == 100
    assert sum(rendered) < 5 * len(talk)
    rendered.clear()
    turn_places.find_turns(template, whole, text, SPECIAL)  # of a second conversation all kinds are known
    assert sum(rendered) == len(talk)


def test_short_plain_conversations_are_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(published.QWEN3, VARIABLES)
    first, second = (
        [chat(*texts), template.render(chat(*texts))] for texts in (["a", "b"] * 2, ["e ", " f", "\ng", "h"])
    )
    trained = [False, True, False, True]
    turn_places.find_turns(template, Conversation(first[0], trained), first[1], SPECIAL)
    monkeypatch.setattr(ChatTemplate, "render", lambda *_, **__: pytest.fail("its frame is known"))
    found = turn_places.find_turns(template, Conversation(second[0], trained), second[1], SPECIAL)
    written = [second[1][start:end] for start, end in found]
    assert written == [" f<|im_end|>\n", "<think>\n\n</think>\n\nh<|im_end|>\n"]
