"""Where messages stand in the rendering of a conversation: one more rendering shows it, in which marks stand in them.

A mark is put where templates do not look: behind the white space and the tags that a text begins with, and before those
that it ends with. Without its marks the second rendering must be the first, or there are no anchors.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qsharded.data.chat import ChatTemplate
from qsharded.data.formats import Conversation
from qsharded.data.messages import REASONING_KEYS, Message
from qsharded.data.tool_calls import renamed

_CLOSE = "</think>"
_LEADING = re.compile(r"\s*(?:<[^<>\s]+>\s*)*")
_TRAILING = re.compile(r"(?:\s*<[^<>\s]+>)*\s*\Z")
_LONGEST_TAGS = 200  # of a text's end, looked through for tags
# Unicode noncharacters, for use inside a program only: they stand in no text meant for reading.
_OPEN, _SHUT = "\ufdd2", "\ufdd3"
_MARK = re.compile(f"{_OPEN}([0-9]+)([a-z]){_SHUT}")


@dataclass(frozen=True)
class Anchors:
    """Of each message, None where it shows none.

    Attributes:
        heads: the character at which the first of its texts begins, less what that begins with; a text is its
            reasoning, its content or the name of its first tool call.
        tails: the character at which its content ends, less what that ends with.
    """

    heads: Sequence[int | None]
    tails: Sequence[int | None]

    @classmethod
    def of(cls, template: ChatTemplate, chat: Conversation, text: str) -> "Anchors | None":
        """Those of ``chat`` in ``text``, its rendering; None where marks change more than themselves."""
        if _OPEN in text or _SHUT in text:
            return None
        messages = [_marked(message, number) for number, message in enumerate(chat.messages)]
        try:
            written = template.render(messages, tools=chat.tools)
        except ValueError:  # a template may look into texts
            return None
        found, plain = _unmarked(written)
        if plain != text:
            return None
        places = [[at for kind in "rsc" if (at := found.get((n, kind))) is not None] for n in range(len(messages))]
        heads = [min(of_message, default=None) for of_message in places]
        return cls(heads, [found.get((n, "e")) for n in range(len(messages))])


def _unmarked(written: str) -> tuple[dict[tuple[int, str], int | None], str]:
    """(where each mark stands, None for one that stands there twice; the text without them)."""
    found: dict[tuple[int, str], int | None] = {}
    pieces, length, end = [], 0, 0
    for mark in _MARK.finditer(written):
        pieces.append(written[end : mark.start()])
        length, end = length + mark.start() - end, mark.end()
        name = int(mark[1]), mark[2]
        found[name] = None if name in found else length
    return found, "".join([*pieces, written[end:]])


def _marked(message: Message, number: int) -> Message:
    copy, content = dict(message), message.get("content")
    if isinstance(content, str):
        copy["content"] = _marked_content(content, number, message["role"] == "assistant")
    for key in REASONING_KEYS:
        if message.get(key):
            copy[key] = _with_head(message[key], _mark(number, "r"))
    if message.get("tool_calls"):
        first, *others = message["tool_calls"]
        copy["tool_calls"] = [renamed(first, _mark(number, "c") + first["function"]["name"]), *others]
    return copy


def _marked_content(content: str, number: int, thinks: bool) -> str:
    reasoning, closed, said = content.rpartition(_CLOSE) if thinks else ("", "", content)
    if said.strip():
        tags = _TRAILING.search(said, max(0, len(said) - _LONGEST_TAGS))
        assert tags is not None, "the pattern matches the empty string"
        at = max(tags.start(), _head(said))
        said = _with_head(said[:at], _mark(number, "s")) + _mark(number, "e") + said[at:]
    return (_with_head(reasoning, _mark(number, "r")) if reasoning.strip() else reasoning) + closed + said


def _with_head(text: str, mark: str) -> str:
    at = _head(text)
    return text[:at] + mark + text[at:]


def _head(text: str) -> int:
    found = _LEADING.match(text)
    assert found is not None, "the pattern matches the empty string"
    return found.end()


def _mark(number: int, kind: str) -> str:
    return f"{_OPEN}{number}{kind}{_SHUT}"


def is_plain(chat: Conversation) -> bool:
    """Whether every message is a role and a text that is not blank, without tool calls or reasoning."""
    return not chat.tools and all(
        message.keys() == {"role", "content"}
        and message["role"] in ("system", "developer", "user", "assistant")
        and message["content"].strip()
        and _CLOSE not in message["content"]
        for message in chat.messages
    )
