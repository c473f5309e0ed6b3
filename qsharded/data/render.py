"""From what a row says to the text that is tokenized, and which of it is learned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qsharded.data.chat import Span
from qsharded.data.shapes import Conversation, PromptCompletion, Shape, Text
from qsharded.data.tokenizer import Tokenizer

TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        spans: what is learned of ``text``, in characters; None: all of it.
        prompt: a beginning of ``text`` that is not learned, and that generation will be given alone.
        bos: whether BOS comes first where the tokenizer adds one; a chat template writes its own.
        eos: whether EOS comes last, and is learned.
    """

    text: str
    spans: Sequence[Span] | None = None
    prompt: str = ""
    bos: bool = True
    eos: bool = True


def render(shape: Shape, tokenizer: Tokenizer, train_on: TrainOn) -> Rendered:
    """The text of a row.

    Raises:
        ValueError: no chat template for a conversation, one that refuses it or hides what the assistant says, no
            message of the assistant to learn, or text that no tokenizer takes.
    """
    match shape:
        case Conversation():
            rendered = _render_chat(shape, tokenizer, train_on)
        case PromptCompletion():
            rendered = Rendered(shape.prompt + shape.completion, prompt=shape.prompt if train_on != "all" else "")
        case Text():
            rendered = Rendered(shape.text)
    _check_encodable(rendered.text)
    return rendered


def _render_chat(chat: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> Rendered:
    if train_on == "assistant":
        chat = _up_to_last_learned(chat)
    text = tokenizer.render(chat.messages, tools=chat.tools)
    spans = tokenizer.assistant_spans(chat, text) if train_on == "assistant" else None
    # A template that ends the turn with no special token would never teach the model to stop.
    return Rendered(text, spans, bos=False, eos=not text.rstrip().endswith(tokenizer.special_texts))


def _up_to_last_learned(chat: Conversation) -> Conversation:
    """The conversation less the messages at its end on which nothing learned depends."""
    if True not in chat.learned:
        raise ValueError("the conversation has no message of the assistant to learn")
    kept = len(chat.learned) - chat.learned[::-1].index(True)
    return replace(chat, messages=chat.messages[:kept], learned=chat.learned[:kept])


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair stands alone behind {text[: error.start][-20:]!r}") from None
