"""Where in a rendered conversation the assistant's text stands: as the template marks it, or as rendering shows it."""

from collections.abc import Sequence

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.formats import Conversation
from qsharded.data.turn_places import find_turns
from qsharded.data.turns import check_ending


def assistant_spans(template: ChatTemplate, chat: Conversation, text: str, special: Sequence[str]) -> list[Span]:
    """[start, end) in characters of each trained turn of ``chat`` in ``text``, its rendering.

    A turn reaches from the end of the assistant's header to its end-of-turn token, white space behind that left out;
    one that the template marks by ``{% generation %}`` is as marked.

    Args:
        template: the one that rendered ``text``.
        special: texts of special tokens, any of which may end a turn.

    Raises:
        ValueError: the turns cannot be told from the rest for certain.
    """
    if template.marks_generation:
        return _marked_spans(template, chat)
    check_ending(template, tuple(special))
    return [_without_blank_end(text, span, special) for span in find_turns(template, chat, text, special)]


def _marked_spans(template: ChatTemplate, chat: Conversation) -> list[Span]:
    spans = template.generation_spans(chat.messages, chat.tools)
    pairs = zip(chat.messages, chat.trained, strict=True)
    trained = [trained for message, trained in pairs if message["role"] == "assistant"]
    if all(trained) and spans:
        return spans
    if len(spans) != len(trained):
        raise ValueError(f"the chat template marks {len(spans)} spans for {len(trained)} assistant messages")
    return [span for span, wanted in zip(spans, trained, strict=True) if wanted]


def _without_blank_end(text: str, span: Span, special: Sequence[str]) -> Span:
    """The span less the white space behind its end-of-turn token: generation stops at that token."""
    start, end = span
    turn = text[start:end].rstrip()
    return (start, start + len(turn)) if turn.endswith(tuple(special)) else span
