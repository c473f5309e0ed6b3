"""Finding the assistant's turns in a conversation by rendering parts and variants of it.

Of a template only the output is known. So a turn is found by rendering the conversation cut before it (with the
assistant's header) and after it. Some templates write a turn differently once more follows (Qwen3 and DeepSeek-R1 drop
its reasoning), and then those cuts are no prefixes of the whole; there the turn's content, or the name of its last
tool call, is replaced by probes, which show its place. Each step is checked against the whole text: a turn is found
for certain or refused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.formats import Conversation, Message
from qsharded.data.tool_calls import renamed

# They differ in their first and in their last character, and nothing strips or escapes them.
_PROBES = ("Q0q", "Z1z")
_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]

# How a turn begins, its header and what stands between that and a piece of it; and the latter alone (Mistral: a space).
Lead = tuple[str, str]


class TurnUnclear(ValueError):
    """A turn cannot be told from the rest for certain."""


class TurnFinder:
    """Finds turns of ``chat`` in ``text``, its rendering by ``template``; ``special``: the texts of special tokens."""

    def __init__(self, template: ChatTemplate, chat: Conversation, text: str, special: Sequence[str]) -> None:
        self._template = template
        self._messages = chat.messages
        self._tools = chat.tools
        self._text = text
        self._special = special

    def turn(self, number: int) -> Span:
        """[start, end) in characters of message ``number``, from behind the header to the last of the turn's end.

        Raises:
            TurnUnclear: the turn cannot be told from the rest for certain.
        """
        start = self._end_of_prefix(number, add_generation_prompt=True)
        end = self._end_of_prefix(number + 1)
        if start is None or end is None:
            probe = self._probe_call if "tool_calls" in self._messages[number] else self._probe
            start, end = probe(number, start)
        return start, end

    def _end_of_prefix(self, count: int, add_generation_prompt: bool = False) -> int | None:
        """The length of the first ``count`` messages' rendering, or None if the whole does not begin with it."""
        if count == len(self._messages):
            return len(self._text)
        try:
            prefix = self._render(self._messages[:count], add_generation_prompt)
        except ValueError:  # a template may refuse the part of a conversation that it takes whole
            return None
        return len(prefix) if self._text.startswith(prefix) else None

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=self._tools)

    def _probe(self, number: int, header_end: int | None) -> Span:
        """The turn by its content's place; what stands between header and content (a think block) belongs to it."""
        before, after = self._around_content(self._messages, number)
        begin, end = len(before), len(self._text) - len(after)
        content = self._messages[number].get("content", "").strip()
        said = self._text[begin:end].strip()
        same_frame = self._text.startswith(before) and self._text.endswith(after) and begin <= end
        # A template may drop the content's head, never its tail.
        if not same_frame or not content.endswith(said) or (content and not said):
            raise self._unclear(number)
        try:
            _, ending = self._around_content(self._messages[: number + 1], number)
        except ValueError as error:
            raise self._unclear(number) from error
        if header_end is None:
            header_end = begin - len(self._lead(number, before, _content_leads(self._template)))
        return header_end, end + self._end_of_turn(number, after, ending)

    def _around_content(self, messages: list[Message], number: int) -> tuple[str, str]:
        """The text before and after the content of message ``number``."""
        variants = ([*messages[:number], {**messages[number], "content": probe}] for probe in _PROBES)
        return _common_ends(*(self._render(variant + messages[number + 1 :]) for variant in variants))

    def _probe_call(self, number: int, header_end: int | None) -> Span:
        """The turn by its last call's place: content may be missing, or be written beside calls or not."""
        before, after = self._around_last_name(self._messages, number)
        try:
            _, ending = self._around_last_name(self._messages[: number + 1], number)
        except ValueError as error:
            raise self._unclear(number) from error
        length = self._end_of_turn(number, after, ending)
        if header_end is None:
            header_end = len(before) - len(self._lead(number, before, self._call_leads(number)))
        return header_end, len(self._text) - len(after) + length

    def _around_last_name(self, messages: list[Message], number: int) -> tuple[str, str]:
        """What stands before and after the name in the last call of message ``number``.

        Only the name's first place is used: a template may repeat it with the tool's answer.
        """
        *others, last = messages[number]["tool_calls"]
        texts = []
        for probe in _PROBES:
            variant = {**messages[number], "tool_calls": [*others, renamed(last, probe)]}
            texts.append(self._render([*messages[:number], variant, *messages[number + 1 :]]))
        before, name = _common_start(*texts), last["function"]["name"]
        text = self._render(messages)
        if before in texts or not text.startswith(before + name):
            raise self._unclear(number)
        return before, text[len(before) + len(name) :]

    def _lead(self, number: int, before: str, leads: Iterable[Lead]) -> str:
        """What stands between the header and the piece that ``before`` ends at."""
        found = next((lead for frame, lead in leads if before.endswith(frame)), None)
        if found is None:
            raise self._unclear(number)
        return found

    def _call_leads(self, number: int) -> Iterator[Lead]:
        def start(messages: list[Message]) -> str:
            return self._around_last_name(messages, len(_QUESTION))[0]

        return _leads(self._template, self._tools, self._messages[number], start)

    def _end_of_turn(self, number: int, after: str, ending: str) -> int:
        """How much of ``after``, the text behind the turn's last piece, is the turn's end.

        That is ``ending``, what follows the piece when the conversation ends there, or as much of it, up to a special
        token, as follows here too: Phi-3 puts EOS behind the last turn's end.
        """
        if after.startswith(ending):
            return len(ending)
        shared = _common_start(ending, after)
        length = max((shared.rfind(token) + len(token) for token in self._special if token in shared), default=0)
        if not length:
            raise self._unclear(number)
        return length

    def _unclear(self, number: int) -> TurnUnclear:
        return TurnUnclear(
            f"cannot tell which text of the assistant's message {number} to train on: the chat template writes it "
            "differently when more follows. Train with --one-example-per-answer, which renders each answer as it would "
            'be at generation; or give the message "weight": 0, which excludes it; or give the messages up to '
            "it as prompt and it alone as completion; or mark the assistant's text by {% generation %} in "
            "chat_template.jinja"
        )


@cache
def check_ending(template: ChatTemplate, special: tuple[str, ...]) -> None:
    """Refuse a template that goes on behind the last turn's end, as with a header for the next answer.

    Raises:
        ValueError: it does.
    """
    _, ending = usual_frame(template) or ("", "")
    if any(token in ending for token in special) and not ending.rstrip().endswith(special):
        raise ValueError(
            f"the chat template ends a conversation by {ending!r}, which is more than the end of the assistant's turn. "
            "It should write the header of the next answer only if add_generation_prompt is true"
        )


@cache
def usual_frame(template: ChatTemplate) -> tuple[str, str] | None:
    """What stands before and after the content of an answer in the simplest conversation, None if that is refused."""
    try:
        return _common_ends(*_with_probes(template, _QUESTION, []))
    except ValueError:
        return None


@cache
def _content_leads(template: ChatTemplate) -> tuple[Lead, ...]:
    def start(messages: list[Message]) -> str:
        return _common_start(*_with_probes(template, messages[:1], messages[2:]))

    return tuple(_leads(template, None, {"role": "assistant", "content": ""}, start))


def _with_probes(template: ChatTemplate, before: list[Message], after: list[Message]) -> list[str]:
    answers: list[Message] = [{"role": "assistant", "content": probe} for probe in _PROBES]
    return [template.render([*before, answer, *after]) for answer in answers]


def _leads(
    template: ChatTemplate, tools: list[Any] | None, answer: Message, start: Callable[[list[Message]], str]
) -> Iterator[Lead]:
    """The leads of ``answer`` where it follows a question: at the conversation's end, and with another question behind.

    Args:
        start: gives the rendering of messages, of which the second is ``answer``, up to the piece in question.
    """
    try:
        question = template.render(_QUESTION, tools=tools)
        prompt = template.render(_QUESTION, tools=tools, add_generation_prompt=True)
        last = start([*_QUESTION, answer])
    except ValueError:
        return
    if last.startswith(prompt):
        yield last[len(prompt) :], last[len(prompt) :]
    if prompt.startswith(last):  # and goes on to what the answer is to begin with
        yield "", ""
    header = _header(question, prompt)
    if last.startswith(question + header):
        yield last[len(question) :], last[len(question + header) :]
    try:
        earlier = start([*_QUESTION, answer, *_QUESTION])
    except ValueError:  # a call that nothing answers
        return
    if earlier.startswith(question + header):
        yield earlier[len(question) :], earlier[len(question + header) :]


def _header(question: str, prompt: str) -> str:
    """The header of the assistant's turn: what makes a question a prompt, less a think block that this opens."""
    header = prompt.removeprefix(question) if prompt.startswith(question) else ""
    before, opened, behind = header.rpartition("<think>")
    return before if opened and not behind.strip() else header


def _common_ends(one: str, other: str) -> tuple[str, str]:
    return _common_start(one, other), _common_start(one[::-1], other[::-1])[::-1]


def _common_start(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
