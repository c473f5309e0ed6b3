"""The assistant's tool calls in a row, brought to one schema before any chat template sees them."""

from typing import Any

from qsharded.data.json_text import from_json

Call = dict[str, Any]


def parse_calls(value: Any, where: str) -> list[Call]:
    """The calls as ``{"type": "function", "function": {"name", "arguments"}}``, other fields (``id``) kept.

    Args:
        value: a list of calls, with or without the outer object; it or each call may be JSON, as Hub datasets keep it.
        where: what the value is called in errors.

    Raises:
        ValueError: no such list, or a call without a name or with arguments that are neither object nor text.
    """
    calls = from_json(value, where)
    if isinstance(calls, str):
        raise ValueError(f"{where} is text, but not JSON: {calls!r:.80}")
    if not isinstance(calls, list):
        raise ValueError(f"{where} must be a list of tool calls, got {type(calls).__name__}")
    return [_call(from_json(call, f"{where}[{number}]"), f"{where}[{number}]") for number, call in enumerate(calls)]


def renamed(call: Call, name: str) -> Call:
    """``call`` of another function, also where its id carries the name (Kimi: "functions.NAME:0")."""
    own = call["function"]
    ids = {"id": call["id"].replace(own["name"], name)} if isinstance(call.get("id"), str) else {}
    return {**call, **ids, "function": {**own, "name": name}}


def _call(value: Any, where: str) -> Call:
    function = from_json(value.get("function", value), where) if isinstance(value, dict) else value
    if not isinstance(function, dict):
        raise ValueError(f"{where} must be an object with name and arguments, got {function!r:.80}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} must name a function, got name {name!r:.80}")
    outer = {key: item for key, item in value.items() if function is not value and item is not None}
    own = {"name": name, "arguments": _arguments(function, where)}
    others = {key: item for key, item in function.items() if key not in own}
    if function is value:  # the call's own fields then stand among the function's
        outer = {key: others.pop(key) for key in ("id", "type") if key in others}
    return {"type": "function", **outer, "function": own | others}


def _arguments(function: dict[str, Any], where: str) -> dict[str, Any] | str:
    arguments = function.get("arguments")
    if arguments is None and "parameters" in function:
        raise ValueError(f"{where} has parameters; a call's values are to be given as arguments")
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, dict | str):
        raise ValueError(f"{where}: arguments must be an object or its JSON, got {arguments!r:.80}")
    return arguments
