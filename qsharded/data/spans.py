"""Where in a rendered conversation the assistant's text stands.

A template that marks it by ``{% generation %}`` is taken at its word. Of any other only the output is known, so the
place is found by rendering: the conversation cut before the turn (with the assistant's header) and after it. Some
templates write a turn differently once more follows (Qwen3 and DeepSeek-R1 drop its reasoning), so that those cuts are
no prefixes of the whole; there the turn's content is replaced by probes, which show its place. Each step is checked
against the whole text: a mask is right or refused.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.shapes import Conversation, Message

# They differ in their first and in their last character, and nothing strips or escapes them.
_PROBES = ("Q0q", "Z1z")


def assistant_spans(template: ChatTemplate, chat: Conversation, text: str, special: Sequence[str]) -> list[Span]:
    """[start, end) in characters of each learned turn of ``chat`` in ``text``, its rendering.

    A turn reaches from the end of the assistant's header to its end-of-turn token, white space behind that left out;
    marked ones are as the template marks them.

    Args:
        template: the one that rendered ``text``.
        special: texts of special tokens, any of which may end a turn.

    Raises:
        ValueError: the turns cannot be told from the rest for certain.
    """
    if template.marks_generation:
        return _marked_spans(template, chat)
    _check_ending(template, tuple(special))
    finder = _Finder(template, chat.messages, chat.tools, text, special)
    spans = [finder.turn(number) for number, learned in enumerate(chat.learned) if learned]
    return [_without_blank_end(text, span, special) for span in spans]


def _marked_spans(template: ChatTemplate, chat: Conversation) -> list[Span]:
    spans = template.generation_spans(chat.messages, chat.tools)
    learned = [learned for learned, message in zip(chat.learned, chat.messages, strict=True) if _is_assistant(message)]
    if all(learned) and spans:
        return spans
    if len(spans) != len(learned):
        raise ValueError(f"the chat template marks {len(spans)} spans for {len(learned)} assistant messages")
    return [span for span, wanted in zip(spans, learned, strict=True) if wanted]


def _is_assistant(message: Message) -> bool:
    return message["role"] == "assistant"


def _without_blank_end(text: str, span: Span, special: Sequence[str]) -> Span:
    """The span less the white space behind its end-of-turn token: generation stops at that token."""
    start, end = span
    turn = text[start:end].rstrip()
    return (start, start + len(turn)) if turn.endswith(tuple(special)) else span


class _Finder:
    """Finds turns of one conversation by rendering parts and variants of it."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools: list[Any] | None,
        text: str,
        special: Sequence[str],
    ) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools
        self.text = text
        self.special = special

    def turn(self, number: int) -> Span:
        start = self._end_of_prefix(number, add_generation_prompt=True)
        end = self._end_of_prefix(number + 1)
        if start is None or end is None or end <= start:
            start, end = self._probe(number, start)
        return start, end

    def _end_of_prefix(self, count: int, add_generation_prompt: bool = False) -> int | None:
        """The length of the first ``count`` messages' rendering, or None if the whole does not begin with it."""
        if count == len(self.messages):
            return len(self.text)
        try:
            prefix = self._render(self.messages[:count], add_generation_prompt)
        except ValueError:  # a template may refuse the part of a conversation that it takes whole
            return None
        return len(prefix) if self.text.startswith(prefix) else None

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, tools=self.tools)

    def _probe(self, number: int, header_end: int | None) -> Span:
        """The turn by its content's place; what stands between header and content (a think block) belongs to it."""
        before, after = self._around_content(self.messages, number)
        begin, end = len(before), len(self.text) - len(after)
        content = self.messages[number].get("content", "").strip()
        said = self.text[begin:end].strip()
        same_frame = self.text.startswith(before) and self.text.endswith(after) and begin <= end
        # A template may drop the content's head, never its tail.
        if not same_frame or not content.endswith(said) or (content and not said):
            raise self._unclear(number)
        if header_end is None or header_end > begin:
            header_end = begin - len(self._lead(number, before))
        return header_end, end + self._end_of_turn(number, after)

    def _lead(self, number: int, before: str) -> str:
        """What stands between header and content, as it does in the simplest conversation."""
        lead = _usual_lead(self.template)
        if lead is None or not before.endswith(lead):
            raise self._unclear(number)
        return lead

    def _around_content(self, messages: list[Message], number: int) -> tuple[str, str]:
        """The text before and after the content of message ``number``."""
        return _common_ends(*(self._render(_with_content(messages, number, probe)) for probe in _PROBES))

    def _end_of_turn(self, number: int, after: str) -> int:
        """The length of what ends the turn: what follows the content when the conversation ends there, or as much of
        it, up to a special token, as follows here too (Phi-3 puts EOS behind the last turn's end)."""
        try:
            _, ending = self._around_content(self.messages[: number + 1], number)
        except ValueError as error:
            raise self._unclear(number) from error
        if after.startswith(ending):
            return len(ending)
        shared = _common_start(ending, after)
        length = max((shared.rfind(token) + len(token) for token in self.special if token in shared), default=0)
        if not length:
            raise self._unclear(number)
        return length

    def _unclear(self, number: int) -> ValueError:
        return ValueError(
            f"cannot tell which text of the assistant's message {number} is to be learned: the chat template writes it "
            "differently when more follows. Mark it by {% generation %} in chat_template.jinja, give the conversation "
            "as one row per answer, or train on all tokens"
        )


_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]


@cache
def _around_usual_content(template: ChatTemplate) -> tuple[str, str] | None:
    """The text before and after an answer's content in the simplest conversation; None if the template refuses it."""
    try:
        texts = [template.render([*_QUESTION, {"role": "assistant", "content": probe}]) for probe in _PROBES]
    except ValueError:
        return None
    return _common_ends(*texts)


@cache
def _usual_lead(template: ChatTemplate) -> str | None:
    """What the template writes between the assistant's header and content (Mistral: a space), None if not clear."""
    around = _around_usual_content(template)
    if around is None:
        return None
    before, _ = around
    header = template.render(_QUESTION, add_generation_prompt=True)
    common = _common_start(header, before)
    return before[len(common) :] if common in (header, before) else None


@cache
def _check_ending(template: ChatTemplate, special: tuple[str, ...]) -> None:
    """Refuse a template that goes on behind the last turn's end, as with a header for the next answer."""
    _, ending = _around_usual_content(template) or ("", "")
    if any(token in ending for token in special) and not ending.rstrip().endswith(special):
        raise ValueError(
            f"the chat template ends a conversation by {ending!r}, which has more than the end of the assistant's turn. "
            "It should write the header of the next answer only if add_generation_prompt is true"
        )


def _common_ends(one: str, other: str) -> tuple[str, str]:
    return _common_start(one, other), _common_start(one[::-1], other[::-1])[::-1]


def _common_start(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _with_content(messages: Iterable[Message], number: int, content: str) -> list[Message]:
    return [{**message, "content": content} if at == number else message for at, message in enumerate(messages)]
