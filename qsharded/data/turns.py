"""Finding the assistant's turns in a conversation by rendering parts and variants of it.

Of a template only the output is known. So a turn is found by rendering the conversation cut before it (with the
assistant's header) and after it. Some templates write a turn differently once more follows (Qwen3 and DeepSeek-R1 drop
its reasoning), and then those cuts are no prefixes of the whole; there the turn's content is replaced by probes, which
show its place. Each step is checked against the whole text: a turn is found for certain or refused.
"""

from collections.abc import Sequence
from functools import cache

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.shapes import Conversation, Message

# They differ in their first and in their last character, and nothing strips or escapes them.
_PROBES = ("Q0q", "Z1z")
_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]


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
            ValueError: the turn cannot be told from the rest for certain.
        """
        start = self._end_of_prefix(number, add_generation_prompt=True)
        end = self._end_of_prefix(number + 1)
        if start is None or end is None:
            start, end = self._probe(number, start)
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
        if header_end is None:
            header_end = begin - len(self._lead(number, before))
        return header_end, end + self._end_of_turn(number, after)

    def _around_content(self, messages: list[Message], number: int) -> tuple[str, str]:
        """The text before and after the content of message ``number``."""
        variants = ([*messages[:number], {**messages[number], "content": probe}] for probe in _PROBES)
        return _common_ends(*(self._render(variant + messages[number + 1 :]) for variant in variants))

    def _lead(self, number: int, before: str) -> str:
        """What stands between header and content, as it does in the simplest conversation."""
        lead = _usual_lead(self._template)
        if lead is None or not before.endswith(lead):
            raise self._unclear(number)
        return lead

    def _end_of_turn(self, number: int, after: str) -> int:
        """The length of the turn's end: what follows the content when the conversation ends there.

        Or as much of that, up to a special token, as follows here too: Phi-3 puts EOS behind the last turn's end.
        """
        try:
            _, ending = self._around_content(self._messages[: number + 1], number)
        except ValueError as error:
            raise self._unclear(number) from error
        if after.startswith(ending):
            return len(ending)
        shared = _common_start(ending, after)
        length = max((shared.rfind(token) + len(token) for token in self._special if token in shared), default=0)
        if not length:
            raise self._unclear(number)
        return length

    def _unclear(self, number: int) -> ValueError:
        return ValueError(
            f"cannot tell which text of the assistant's message {number} is to be learned: the chat template writes it "
            "differently when more follows. Mark it by {% generation %} in chat_template.jinja, give the conversation "
            "as one row per answer, or train on all tokens"
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
    if frame is None:
        return None
    prompt, before, _ = frame
    common = _common_start(prompt, before)
    return before[len(common) :] if common in (prompt, before) else None


@cache
def _usual_frame(template: ChatTemplate) -> tuple[str, str, str] | None:
    """(prompt, before, after) of the simplest conversation: what the model is given to answer, and what stands before
    and after an answer's content. None if the template refuses such a conversation."""
    try:
        prompt = template.render(_QUESTION, add_generation_prompt=True)
        texts = [template.render([*_QUESTION, {"role": "assistant", "content": probe}]) for probe in _PROBES]
    except ValueError:
        return None
    return prompt, *_common_ends(*texts)


def _common_ends(one: str, other: str) -> tuple[str, str]:
    return _common_start(one, other), _common_start(one[::-1], other[::-1])[::-1]


def _common_start(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
