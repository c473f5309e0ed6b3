"""What a chat template leaves out of a conversation, found by rendering a copy in which every part carries a marker.

Text could be searched for instead, but short text is found by chance, and some templates escape or trim theirs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from qsharded.data.chat import ChatTemplate
from qsharded.data.formats import Conversation
from qsharded.data.messages import REASONING_KEYS, Message
from qsharded.data.tool_calls import renamed

_LEADING_TAGS = re.compile(r"(?:\s*<[^<>\s]+>)*")
_THINK_TAGS = re.compile(r"(</?think>)")

REASONING, CALL, TOOLS = "reasoning", "tool calls", "definitions of tools"
ARGUMENTS, TOOL_ANSWER = "arguments of tool calls", "tools' answers"
# What else is told of a row than that its rendering lacks something; qsharded/data/notes.py has the words.
EMPTY_ANSWER, UNMARKED_END, UNTRAINED_END, PLAIN_END = "empty answer", "unmarked end", "untrained end", "plain end"
UNHEEDED = "asks to train on another's message"
_TEXT_BESIDE_CALL = "text beside tool calls"


@dataclass(frozen=True)
class Omission:
    """A part of a conversation that its rendering lacks.

    Attributes:
        kind: what it is, in words that go with "leaves out": :data:`REASONING`, "system messages", ...; or one of
            the other kinds that :mod:`qsharded.data.notes` has words for.
        message: the number of the message that it is part of, None of the row.
        text: what is lost.
    """

    kind: str
    message: int | None
    text: str

    def __str__(self) -> str:
        place = "" if self.message is None else f"message {self.message}: "
        return f"{place}{self.text!r:.80}"


def omissions(template: ChatTemplate, chat: Conversation, text: str) -> list[Omission]:
    """What of ``chat`` is missing in ``text``, its rendering; reasoning only where it was to be trained on.

    Raises:
        ValueError: the assistant's text is, or of a call the name alone, where it was to be trained on.
    """
    roles = tuple((message["role"], bool(message.get("content", "").strip())) for message in _plain(chat))
    if len(roles) == len(chat.messages) and not chat.tools:
        found = [_whole(chat, number) for number in _left_out_of_plain(template, roles)]
    else:
        found = find_omissions(chat, text, lambda marked: template.render(marked.messages, tools=marked.tools))
    return judged(chat, found)


def judged(chat: Conversation, found: list[Omission]) -> list[Omission]:
    """``found`` less what nobody misses, and in words for the user.

    Raises:
        ValueError: as :func:`omissions`.
    """
    kept, lost = [], Counter((one.message, one.kind) for one in found)
    for one in found:
        calls = one.message is not None and "tool_calls" in chat.messages[one.message]
        trained = one.message is not None and chat.trained[one.message]
        if one.kind == _ANSWER and calls:
            kept.append(replace(one, kind=_TEXT_BESIDE_CALL))
        elif one.kind == _ANSWER and trained:
            raise ValueError(_LOST_ANSWER.format(number=one.message, text=repr(one.text[:80])))
        elif one.kind == CALL and trained and lost[one.message, CALL] > lost[one.message, ARGUMENTS]:
            raise ValueError(_LOST_NAME.format(number=one.message, text=repr(one.text[:80])))
        elif one.kind == ARGUMENTS and lost[one.message, CALL] >= lost[one.message, ARGUMENTS]:
            pass  # told by the call's name
        elif one.kind != REASONING or trained:
            kept.append(one)
    return kept


def unwritten_answers(chat: Conversation, found: Sequence[Omission]) -> set[int]:
    """The numbers of the trained messages of which, with ``found`` left out, nothing is written but their end."""
    lost = Counter((one.message, one.kind) for one in found)
    trained = [(number, message) for number, message in enumerate(chat.messages) if chat.trained[number]]
    return {number for number, message in trained if lost and _is_unwritten(message, number, lost)}


def _is_unwritten(message: Message, number: int, lost: Mapping[tuple[int | None, str], int]) -> bool:
    _, closed, text = (message.get("content") or "").rpartition("</think>")
    thinks = bool(closed) or any(message.get(key) for key in REASONING_KEYS)
    calls = len(message.get("tool_calls", ()))
    written = [
        calls > lost.get((number, CALL), 0),
        text.strip() and (number, _TEXT_BESIDE_CALL) not in lost,
        thinks and (number, REASONING) not in lost,
    ]
    return bool(calls or thinks) and not any(written)


def find_omissions(chat: Conversation, text: str, write: Callable[[Conversation], str]) -> list[Omission]:
    """The parts of ``chat`` that ``write`` leaves out; ``text`` is what it makes of ``chat`` itself."""
    stem = "qmark"
    while stem in text:
        stem += "q"
    marked = _Marked(stem)
    copy = marked.conversation(chat)
    try:
        written = write(copy)
    except ValueError:  # a template may look into names and texts: what it wrote of these is all that can be known
        return [part for part in marked.parts.values() if part.kind != ARGUMENTS and part.text not in text]
    return [part for marker, part in marked.parts.items() if marker not in written]


_ANSWER = "assistant messages"
_LOST_NAME = (
    "message {number} calls a tool ({text}) of which the chat template writes the arguments and not the name: it may "
    'take the name from the call\'s id, as functions.NAME:0; give the calls such ids, or the message "weight": 0'
)
_LOST_ANSWER = (
    "message {number} of the assistant ({text}) is left out by the chat template. Give another by --chat-template, or "
    "leave the row out"
)


def _plain(chat: Conversation) -> Iterator[Message]:
    """The messages that have nothing but text to them."""
    for message in chat.messages:
        content = message.get("content") or ""
        if message["role"] != "tool" and "</think>" not in content and not _SPECIAL_KEYS & message.keys():
            yield message


_SPECIAL_KEYS = {"tool_calls", *REASONING_KEYS}


@lru_cache(maxsize=4096)
def _left_out_of_plain(template: ChatTemplate, roles: tuple[tuple[str, bool], ...]) -> tuple[int, ...]:
    """The numbers of messages that the template leaves out of every conversation of such roles, blank or not.

    Such rows are most of all, and what of them is written depends on no text: one rendering serves all.
    """
    messages = [{"role": role, "content": f"qmark{at}q" if said else ""} for at, (role, said) in enumerate(roles)]
    try:
        text = template.render(messages)
    except ValueError:  # it takes other texts than these
        return ()
    return tuple(at for at, (_, said) in enumerate(roles) if said and f"qmark{at}q" not in text)


def _whole(chat: Conversation, number: int) -> Omission:
    message = chat.messages[number]
    return Omission(_kind(message), number, message["content"].strip())


def _kind(message: Message) -> str:
    return TOOL_ANSWER if message["role"] == "tool" else f"{message['role']} messages"


@dataclass
class _Marked:
    """Makes the marked copy of a conversation; ``parts``: what each marker stands in."""

    stem: str
    parts: dict[str, Omission] = field(default_factory=dict)

    def conversation(self, chat: Conversation) -> Conversation:
        messages = [self._message(message, number) for number, message in enumerate(chat.messages)]
        return replace(chat, messages=messages, tools=chat.tools and [self._tool(tool) for tool in chat.tools])

    def _marker(self, kind: str, number: int | None, text: str) -> str:
        marker = f"{self.stem}{len(self.parts)}z"
        self.parts[marker] = Omission(kind, number, text)
        return marker

    def _message(self, message: Message, number: int) -> Message:
        copy = dict(message)
        if message.get("content"):
            copy["content"] = self._content(message, number)
        key = next((key for key in REASONING_KEYS if message.get(key)), None)
        if key:
            copy[key] = self._in_text(message[key], REASONING, number)
        if "tool_calls" in message:
            copy["tool_calls"] = [self._call(call, number) for call in message["tool_calls"]]
        return copy

    def _content(self, message: Message, number: int) -> str:
        kind, text = _kind(message), message["content"]
        if kind != _ANSWER:
            return self._in_text(text, kind, number)
        head, end, tail = text.rpartition("</think>")
        pieces = [
            piece if _THINK_TAGS.fullmatch(piece) else self._in_text(piece, REASONING, number)
            for piece in _THINK_TAGS.split(head)
        ]
        return "".join(pieces) + end + self._in_text(tail, kind, number)

    def _in_text(self, text: str, kind: str, number: int) -> str:
        """``text`` with a marker behind its first piece: what it begins and ends with, as tags, may matter."""
        if not text.strip():
            return text
        match = _LEADING_TAGS.match(text)
        assert match is not None, "the pattern matches the empty string"
        piece = text[match.end() :].split("<", 1)[0].rstrip()
        at = match.end() + len(piece) if piece else len(text.rstrip())
        return text[:at] + self._marker(kind, number, text.strip()) + text[at:]

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        function, arguments = call["function"], call["function"]["arguments"]
        name = function["name"] + self._marker(CALL, number, function["name"])
        marker = self._marker(ARGUMENTS, number, f"{function['name']}: {arguments}")
        marked = {**arguments, marker: marker} if isinstance(arguments, dict) else arguments + marker
        return renamed(call | {"function": function | {"arguments": marked}}, name)

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return tool
        named = function | {"name": function["name"] + self._marker(TOOLS, None, function["name"])}
        return tool | {"function": named} if "function" in tool else named
