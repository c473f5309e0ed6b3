"""Messages as datasets write them -> messages as chat templates read them."""

from typing import Any

from qsharded.data.json_text import from_json
from qsharded.data.message_weight import WEIGHT_KEYS, asks_for_training
from qsharded.data.tool_calls import parse_calls

Message = dict[str, Any]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

_CALLS = ("function_call", "tool_call", "tool_calls")
# Names of roles in the wild -> names that chat templates know. Letter case and hyphens do not matter.
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai", *_CALLS), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython"), "tool"),
    **{f"{what}_{says}": "tool" for what in ("function", "tool") for says in ("response", "result", "results")},
}
_USUAL_ROLES, _USUAL_KEYS = ("user", "assistant", "system"), {"role", "content"}
_NAMES = (("role", "content"), ("from", "value"))
_CONTENT_KEYS = ("content", "value", "text")


def parse_messages(value: Any, field: str) -> tuple[list[Message], list[bool | None]]:
    """(messages with ``role`` and ``content`` and their other fields as they are, whether each asks to be trained on;
    None: it does not say).

    Args:
        value: the list, or its JSON, as Hub datasets keep what has no one type.
        field: what the value is called in errors.

    Raises:
        ValueError: no such list, a message without role or content, or one whose loss cannot be told.
    """
    messages = from_json(value, field)
    if not isinstance(messages, list):
        raise ValueError(f"{field} must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{field} is empty")
    parsed = [_message(from_json(raw, where), where) for where, raw in _placed(messages, field)]
    kept = [one for one in parsed if one is not None]
    return [message for message, _ in kept], [wanted for _, wanted in kept]


def _placed(values: list[Any], field: str) -> list[tuple[str, Any]]:
    return [(f"{field}[{number}]", value) for number, value in enumerate(values)]


def _message(raw: Any, where: str) -> tuple[Message, bool | None] | None:
    """The message, and whether it asks to be trained on if it says; None for a system message that is null."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, got {type(raw).__name__}")
    if raw.keys() == _USUAL_KEYS and raw["role"] in _USUAL_ROLES and isinstance(raw["content"], str):
        return {"role": raw["role"], "content": raw["content"]}, None  # most are such, of millions
    fields = {key: value for key, value in raw.items() if value is not None}
    called, said = next((names for names in _NAMES if names[0] in fields), (None, ""))
    if called is None:
        raise ValueError(f"{where} has no role")
    name = fields.pop(called)
    role = _role(name, where)
    content = next((fields.pop(key) for key in (said, *_CONTENT_KEYS) if key in fields), None)
    wanted = asks_for_training({key: fields.pop(key) for key in WEIGHT_KEYS if key in fields}, where)
    if content is None and role == "system":
        return None
    if _plain(name) in _CALLS:
        fields, content = {"tool_calls": _as_list(from_json(content, where))} | fields, None
    message = _assembled(role, content, fields, where)
    if content is None and "tool_calls" not in message:
        if role != "assistant" or _unread_text(fields):
            raise ValueError(f"{where} has no {said}")
        message["content"] = ""
    return message, wanted


def _unread_text(fields: dict[str, Any]) -> bool:
    """Whether there is text that may be the content under a name that is not known."""
    return any(isinstance(value, str) for key, value in fields.items() if key not in ("name", *REASONING_KEYS))


def _as_list(calls: Any) -> list[Any]:
    return calls if isinstance(calls, list) else [calls]


def _assembled(role: str, content: Any, fields: dict[str, Any], where: str) -> Message:
    message: Message = {"role": role}
    if content is not None:
        message["content"] = _content(content, where)
    message |= _optional(fields, where)
    if "tool_calls" in message and role != "assistant":
        raise ValueError(f"{where} has tool_calls and the role {role}; only the assistant calls tools")
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
            said[key] = text_of(said[key], f"{key} of {where}")
    return {key: value for key, value in said.items() if value not in ("", [], {})}


def _role(name: Any, where: str) -> str:
    if not isinstance(name, str) or _plain(name) not in _ROLES:
        raise ValueError(f"{where} has the unknown role {name!r}; known are {', '.join(_ROLES)}")
    return _ROLES[_plain(name)]


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _content(value: Any, where: str) -> str:
    """Text, from text or from a list of parts that are all text."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"{where} has a part of type {kind}; only text can be trained on")
        value = "".join(part["text"] for part in value)
    return text_of(value, f"content of {where}")


def text_of(value: Any, what: str) -> str:
    """``value``, which must be text.

    Raises:
        ValueError: it is not; ``what`` names it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {type(value).__name__}: {value!r:.80}")
    return value
