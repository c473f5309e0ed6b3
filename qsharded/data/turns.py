"""Finding the assistant's turns in a conversation by rendering parts and variants of it.

Of a template only the output is known. So a turn is found by rendering the conversation cut before it (with the
assistant's header) and after it. Some templates write a turn differently once more follows (Qwen3 and DeepSeek-R1 drop
its reasoning), and then those cuts are no prefixes of the whole; there the turn's content, or the name of its last
tool call, is replaced by probes, which show its place. Each step is checked against the whole text: a turn is found for certain or refused.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.shapes import Conversation, Message

# They differ in their first and in their last character, and nothing strips or escapes them.
_PROBES = ("Q0q", "Z1z")
_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]


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
            header_end = begin - len(self._lead(number, before))
        return header_end, end + self._end_of_turn(number, after, ending)

    def _around_content(self, messages: list[Message], number: int) -> tuple[str, str]:
        """The text before and after the content of message ``number``."""
        variants = ([*messages[:number], {**messages[number], "content": probe}] for probe in _PROBES)
        return _common_ends(*(self._render(variant + messages[number + 1 :]) for variant in variants))

    def _probe_call(self, number: int, header_end: int | None) -> Span:
        """The turn by its last call's place, which comes behind any content, and may be all that the turn has."""
        before, after = self._around_last_name(self._messages, number, self._text)
        try:
            cut = self._messages[: number + 1]
            _, ending = self._around_last_name(cut, number, self._render(cut))
            length = self._end_of_turn(number, after, ending)
        except ValueError as error:
            raise self._unclear(number) from error
        if header_end is None:
            header_end = len(before) - len(self._call_lead(number, before))
        return header_end, len(self._text) - len(after) + length

    def _around_last_name(self, messages: list[Message], number: int, text: str) -> tuple[str, str]:
        """What of ``text``, the rendering of ``messages``, stands before and after the name in the last call of one.

        Only the name's first place is used: a template may repeat it with the tool's answer.
        """
        *others, last = messages[number]["tool_calls"]
        function = last["function"]
        texts = []
        for probe in _PROBES:
            calls = [*others, {**last, "function": {**function, "name": probe}}]
            variant = {**messages[number], "tool_calls": calls}
            texts.append(self._render([*messages[:number], variant, *messages[number + 1 :]]))
        before = _common_start(*texts)
        if before in texts or not text.startswith(before + function["name"]):
            raise self._unclear(number)
        return before, text[len(before) + len(function["name"]) :]

    def _lead(self, number: int, before: str) -> str:
        """What stands between header and content, as it does in the simplest conversation."""
        lead = _usual_lead(self._template)
        if lead is None or not before.endswith(lead):
            raise self._unclear(number)
        return lead

    def _call_lead(self, number: int, before: str) -> str:
        """What stands between header and the last call's name, as it does where this message answers a question."""
        alone = [*_QUESTION, self._messages[number]]
        header = _header(_frame(self._template, self._tools))
        try:
            start, _ = self._around_last_name(alone, len(_QUESTION), self._render(alone))
        except ValueError as error:
            raise self._unclear(number) from error
        if header is None or not start.startswith(header) or not before.endswith(start[len(header) :]):
            raise self._unclear(number)
        return start[len(header) :]

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
            f"cannot tell which text of the assistant's message {number} is to be learned: the chat template writes it "
            "differently when more follows. Train with --one-example-per-answer, which renders each answer as it would "
            'be at generation; or give the message "weight": 0, which leaves it unlearned; or give the messages up to '
            "it as prompt and it alone as completion; or mark the assistant's text by {% generation %} in "
            "chat_template.jinja"
        )


@cache
def check_ending(template: ChatTemplate, special: tuple[str, ...]) -> None:
    """Refuse a template that goes on behind the last turn's end, as with a header for the next answer.

    Raises:
        ValueError: it does.
    """
    _, _, ending = _usual_frame(template) or ("", "", "")
    if any(token in ending for token in special) and not ending.rstrip().endswith(special):
        raise ValueError(
            f"the chat template ends a conversation by {ending!r}, which is more than the end of the assistant's turn. "
            "It should write the header of the next answer only if add_generation_prompt is true"
        )


@cache
def _usual_lead(template: ChatTemplate) -> str | None:
    """What the template writes between the assistant's header and content (Mistral: a space), None if not clear."""
    frame = _usual_frame(template)
    header = _header(frame)
    return None if frame is None or header is None else frame[1][len(header) :]


@cache
def _usual_frame(template: ChatTemplate) -> tuple[str, str, str] | None:
    return _frame(template, None)


def _frame(template: ChatTemplate, tools: list[Any] | None) -> tuple[str, str, str] | None:
    """(prompt, before, after) of the simplest conversation: what the model is given to answer, and what stands before
    and after an answer's content. None if the template refuses such a conversation."""
    try:
        prompt = template.render(_QUESTION, add_generation_prompt=True, tools=tools)
        answers: list[Message] = [{"role": "assistant", "content": probe} for probe in _PROBES]
        texts = [template.render([*_QUESTION, answer], tools=tools) for answer in answers]
    except ValueError:
        return None
    return prompt, *_common_ends(*texts)


def _header(frame: tuple[str, str, str] | None) -> str | None:
    """The simplest conversation up to the end of the assistant's header, None if that is not clear."""
    if frame is None:
        return None
    prompt, before, _ = frame
    common = _common_start(prompt, before)
    return common if common in (prompt, before) else None


def _common_ends(one: str, other: str) -> tuple[str, str]:
    return _common_start(one, other), _common_start(one[::-1], other[::-1])[::-1]


def _common_start(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
