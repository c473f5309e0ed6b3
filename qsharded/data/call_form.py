"""In which form a chat template takes a tool call, found by rendering probes of one.

Some templates write arguments through ``tojson`` and need the object (Qwen2.5, Llama 3.1): text would come out as JSON
within JSON. Others put text together and need the object's JSON (DeepSeek). And the missing content of a message that
only calls tools is "" to most, while DeepSeek-R1's distillations look for none.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from qsharded.data.chat import ChatTemplate
from qsharded.data.formats import Conversation, Message
from qsharded.data.tool_calls import Call

_KEY, _VALUE = "qkeyq", "zvaluez"
_OBJECT = {_KEY: _VALUE}
_TOOL = {"type": "function", "function": {"name": "probe", "description": "Probe.", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class CallForm:
    """What a template takes.

    Attributes:
        arguments: "any" where object and JSON come out alike, or neither comes out.
        no_content: the content of a message that has none and calls tools.
    """

    arguments: Literal["object", "json", "any"]
    no_content: str | None


def fit_calls(template: ChatTemplate, chat: Conversation) -> Conversation:
    """The conversation with its tool calls in the form that ``template`` takes.

    Raises:
        ValueError: the template takes arguments as an object, and a call's are no JSON of one.
    """
    if not any("tool_calls" in message for message in chat.messages):
        return chat
    form = _call_form(template)
    return replace(chat, messages=[_fitted(message, number, form) for number, message in enumerate(chat.messages)])


def _fitted(message: Message, number: int, form: CallForm) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [_fitted_call(call, f"message {number}", form) for call in message["tool_calls"]]
    return message | {"content": message.get("content") or form.no_content, "tool_calls": calls}


def _fitted_call(call: Call, where: str, form: CallForm) -> Call:
    function = call["function"]
    arguments = function["arguments"]
    if form.arguments == "object" and isinstance(arguments, str):
        arguments = _object(arguments, f"{where}: the arguments of the call of {function['name']!r}")
    elif form.arguments == "json" and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} are not JSON, and the chat template needs an object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {text!r:.80}")
    return value


@cache
def _call_form(template: ChatTemplate) -> CallForm:
    for tools in (None, [_TOOL]):
        for nothing in ("", None):
            with_object = _written(template, _OBJECT, nothing, tools)
            with_json = _written(template, json.dumps(_OBJECT), nothing, tools)
            if with_object == with_json is not None:
                return CallForm("any", nothing)
            if with_object is not None or with_json is not None:
                # where both come out, a template that looks into the object writes it in a way of its own
                return CallForm("json" if with_object is None else "object", nothing)
    return CallForm("any", "")


def _written(
    template: ChatTemplate, arguments: dict[str, str] | str, content: str | None, tools: list[Any] | None
) -> str | None:
    """The rendering of a call, or None if its arguments are missing, escaped (JSON within JSON) or Python's."""
    call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    messages: list[Message] = [
        {"role": "user", "content": "Question"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
    ]
    try:
        text = template.render(messages, tools=tools)
    except ValueError:
        return None
    written = _KEY in text and _VALUE in text and "probe" in text
    damaged = f'\\"{_KEY}' in text or f"'{_KEY}'" in text
    return text if written and not damaged else None
