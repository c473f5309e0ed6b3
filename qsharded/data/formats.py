"""The formats of datasets, and what a row says in each: a conversation, a prompt with its completion, or text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsharded.data.columns import Fields, fields_of
from qsharded.data.json_text import from_json
from qsharded.data.messages import Message, parse_messages, text_of


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: each with ``role`` and, unless it only calls tools, ``content`` (text).
        trained: for each message, whether it is the assistant's and to be trained on.
        tools: descriptions for templates that take them.
        unheeded: the number of the first message that asks for training on it and is not ``trained``.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None = None
    unheeded: int | None = None


@dataclass(frozen=True)
class PromptCompletion:
    """Text to be given and text to be trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text to be trained on as it is."""

    text: str


Record = Conversation | PromptCompletion | Text


def parse_row(row: dict[str, Any], format: str = "auto", columns: Mapping[str, str] | None = None) -> Record:
    """What ``row`` says.

    Args:
        row: fields of one of the formats; others are left alone.
        format: one of ``FORMATS``; "auto" tells the format by the fields that are there and not null, and takes
            ``text`` only where no other format is there.
        columns: field -> the row's column of it; see :mod:`qsharded.data.columns` for those that need no telling.

    Raises:
        ValueError: fields missing, of a wrong type or empty, an unknown role, fields of several formats, or images.
    """
    if format not in FORMATS:
        raise ValueError(f"the dataset format must be one of {', '.join(FORMATS)}, got {format!r}")
    _refuse_images(row)
    name, fields = fields_of(row, format, columns or {})
    return _PARSERS[name](fields)


def _refuse_images(row: dict[str, Any]) -> None:
    for field in ("image", "images", "pixel_values", "video", "videos", "audio", "audios"):
        if row.get(field):
            raise ValueError(f"the row holds {field!r}; only text can be learned, so leave out such rows")


def _messages(fields: Fields) -> Conversation:
    return _of_list(fields, "messages")


def _conversations(fields: Fields) -> Conversation:
    return _of_list(fields, "conversations")


def _of_list(fields: Fields, field: str) -> Conversation:
    """The messages, behind the row's own system message where they have none."""
    messages, asks = parse_messages(fields[field], field)
    system = [] if messages and messages[0]["role"] in ("system", "developer") else _system(fields)
    return _conversation(fields, system + messages, [*[None] * len(system), *asks])


def _alpaca(fields: Fields) -> Conversation:
    instruction, given = text_of(fields["instruction"], "instruction"), text_of(fields.get("input", ""), "input")
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    answer = text_of(fields["output"], "output")
    messages = [*_system(fields), *_history(fields), *_turn(asked, answer)]
    return _conversation(fields, messages, [None] * len(messages))


def _turn(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _history(fields: Fields) -> list[Message]:
    """Earlier turns, as LLaMA-Factory has them: pairs of instruction and answer."""
    history = from_json(fields.get("history") or [], "history")
    turns: list[Message] = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{number}] must be a pair of instruction and answer, got {pair!r:.80}")
        asked, answer = (text_of(text, f"history[{number}]") for text in pair)
        turns += _turn(asked, answer)
    return turns


def _prompt_completion(fields: Fields) -> Record:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptCompletion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        given, of_given = parse_messages(prompt, "prompt")
        answers, of_answers = parse_messages(completion, "completion")
        return _conversation(fields, given + answers, of_given + of_answers, first=len(given))
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise ValueError(f"prompt and completion must both be text or both be lists of messages, got {kinds}")


def _text(fields: Fields) -> Text:
    return Text(text_of(fields["text"], "text"))


_PARSERS: dict[str, Callable[[Fields], Record]] = {
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
FORMATS = ("auto", *_PARSERS)


def _conversation(fields: Fields, messages: list[Message], asks: Sequence[bool | None], first: int = 0) -> Conversation:
    """Args: asks: of each message, as :func:`parse_messages` gives it; first: the first one that may be trained on."""
    trained = [
        number >= first and message["role"] == "assistant" and ask is not False
        for number, (message, ask) in enumerate(zip(messages, asks, strict=True))
    ]
    unheeded = next((number for number, ask in enumerate(asks) if ask and not trained[number]), None)
    return Conversation(messages, trained, _tools(fields), unheeded)


def _system(fields: Fields) -> list[Message]:
    system = text_of(fields.get("system", ""), "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    tools = fields.get("tools")
    if isinstance(tools, str) and not tools.strip():
        return None
    tools = from_json(tools, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of objects")
    return tools or None
