"""The formats of datasets, and what a row says in each: a conversation, a prompt with its completion, or text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qsharded.data.tool_calls import parse_calls

Message = dict[str, Any]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# Names of roles in the wild -> names that chat templates know.
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"function": "tool", "observation": "tool", "ipython": "tool"},
}


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: each with ``role`` and, unless it only calls tools, ``content`` (text).
        trained: for each message, whether it is the assistant's and to be trained on.
        tools: descriptions for templates that take them.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None = None


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


def parse_row(row: dict[str, Any], format: str = "auto") -> Record:
    """What ``row`` says.

    Args:
        row: fields of one of the formats; others are left alone.
        format: one of ``FORMATS``; "auto" tells the format by the fields that are there and not null, and takes
            ``text`` only where no other format is there.

    Raises:
        ValueError: fields missing, of a wrong type or empty, an unknown role, fields of several formats, or images.
    """
    if format not in FORMATS:
        raise ValueError(f"the dataset format must be one of {', '.join(FORMATS)}, got {format!r}")
    present = {key: value for key, value in row.items() if value is not None}
    _refuse_images(present)
    name = _detect(present) if format == "auto" else format
    fields, parse = _PARSERS[name]
    if missing := [field for field in fields if field not in present]:
        raise ValueError(f"format {name!r} needs {' and '.join(missing)}; the row has {_listing(present)}")
    return parse(present)


def _refuse_images(row: dict[str, Any]) -> None:
    for field in ("image", "images", "pixel_values", "video", "videos", "audio", "audios"):
        if row.get(field):
            raise ValueError(f"the row holds {field!r}; only text can be learned, so leave out such rows")


def _detect(row: dict[str, Any]) -> str:
    names = [name for name, (fields, _) in _PARSERS.items() if all(field in row for field in fields)]
    if len(names) > 1 and "text" in names:
        names.remove("text")  # a rendering of the other fields, as in the original Alpaca: they say more
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(f"the fields fit several formats ({', '.join(names)}): choose one with --dataset-format")
    known = "; ".join(" + ".join(fields) for fields, _ in _PARSERS.values())
    raise ValueError(f"the fields fit no known format ({known}); the row has {_listing(row)}")


def _listing(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no fields"


def _messages(row: dict[str, Any]) -> Conversation:
    return _conversation(row, _message_list(row["messages"], "messages"))


def _conversations(row: dict[str, Any]) -> Conversation:
    return _conversation(row, _system(row) + _message_list(row["conversations"], "conversations"))


def _alpaca(row: dict[str, Any]) -> Conversation:
    instruction, given = _text_of(row["instruction"], "instruction"), _text_of(row.get("input", ""), "input")
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    answer = _text_of(row["output"], "output")
    return _conversation(
        row, [*_system(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    )


def _prompt_completion(row: dict[str, Any]) -> Record:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptCompletion(_text_of(prompt, "prompt"), _text_of(completion, "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        given = _message_list(prompt, "prompt")
        return _conversation(row, given + _message_list(completion, "completion"), given=len(given))
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise ValueError(f"prompt and completion must both be text or both be lists of messages, got {kinds}")


def _text(row: dict[str, Any]) -> Text:
    return Text(_text_of(row["text"], "text"))


_PARSERS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Record]]] = {
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _conversations),
    "alpaca": (("instruction", "output"), _alpaca),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "text": (("text",), _text),
}
FORMATS = ("auto", *_PARSERS)


def _conversation(row: dict[str, Any], messages: list[Message], given: int = 0) -> Conversation:
    """``messages`` of which the first ``given`` and those with a weight of 0 (OpenAI's key) are not trained on."""
    weights = [message.pop("weight", 1) for message in messages]
    trained = [
        number >= given and message["role"] == "assistant" and weight != 0
        for number, (message, weight) in enumerate(zip(messages, weights, strict=True))
    ]
    return Conversation(messages, trained, _tools(row))


def _system(row: dict[str, Any]) -> list[Message]:
    system = _text_of(row.get("system", ""), "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # as Hub datasets keep them, whose columns need one type
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"tools is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of objects")
    return tools or None


def _message_list(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{field} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{field} is empty")
    return [_message(raw, f"{field}[{number}]") for number, raw in enumerate(value)]


def _message(raw: Any, where: str) -> Message:
    """The message with ``role`` and ``content``, whatever it called them, and its other fields as they are."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, got {type(raw).__name__}")
    fields = {key: value for key, value in raw.items() if value is not None}
    named, said = ("role", "content") if "role" in fields else ("from", "value")
    if named not in fields:
        raise ValueError(f"{where} has no role")
    message: Message = {"role": _role(fields.pop(named), where)}
    content = fields.pop(said, None)
    if content is not None:
        message["content"] = _content(content, where)
    message |= _optional(fields, where)
    if "tool_calls" in message and message["role"] != "assistant":
        raise ValueError(f"{where} has tool_calls and the role {message['role']}; only the assistant calls tools")
    if content is None and "tool_calls" not in message:
        raise ValueError(f"{where} has no {said}")
    return message


def _optional(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that say something: a template asks whether a key is there, and takes an empty list for a call."""
    said = dict(fields)
    if said.get("function_call"):  # OpenAI's older key, of one call
        said.setdefault("tool_calls", [said.pop("function_call")])
    if "tool_calls" in said:
        said["tool_calls"] = parse_calls(said["tool_calls"] or [], f"{where}.tool_calls")
    for key in REASONING_KEYS:
        if key in said:
            said[key] = _text_of(said[key], f"{key} of {where}")
    return {key: value for key, value in said.items() if value not in ("", [], {})}


def _role(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in _ROLES:
        raise ValueError(f"{where} has the unknown role {name!r}; known are {', '.join(_ROLES)}")
    return _ROLES[name]


def _content(value: Any, where: str) -> str:
    """Text, from text or from a list of parts that are all text."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"{where} has a part of type {kind}; only text can be trained on")
        value = "".join(part["text"] for part in value)
    return _text_of(value, f"content of {where}")


def _text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}: {value!r:.80}")
    return value
