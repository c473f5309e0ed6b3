"""Finding all turns of a conversation at a cost that grows with its length, not with its square.

:class:`qsharded.data.turns.TurnFinder` finds one turn for certain, and renders the conversation some times for it. But
turns of one kind lie alike: between the end of one message's text and the beginning of the next stands the same
text, and the turn begins or ends at the same place of that. So a turn of each kind is found once, and others by their
anchors, where the text between them is the same to the last character. Short conversations of plain text are not even
rendered for anchors: their frame, which is what stands around the texts, depends on their roles alone, and is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from qsharded.data.anchors import Anchors, is_plain
from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.formats import Conversation
from qsharded.data.turns import TurnFinder

_SHORT = 12  # messages; of more there are too many frames to be worth keeping
_KEPT = 10_000  # kinds of a template
# What users write to have some templates begin the answer otherwise: such kinds are of one conversation only.
_SWITCHES = ("/think", "/no_think", "/nothink")

_Kinds = dict[tuple[str, ...], int]


def find_turns(template: ChatTemplate, chat: Conversation, text: str, special: Sequence[str]) -> list[Span]:
    """[start, end) in characters of each trained turn of ``chat`` in ``text``, its rendering.

    Args:
        special: texts of special tokens.

    Raises:
        TurnUnclear: a turn cannot be told from the rest for certain.
    """
    numbers = [number for number, trained in enumerate(chat.trained) if trained]
    switched = _is_switched(text)
    if not switched and len(chat.messages) <= _SHORT and is_plain(chat):
        frame = _frame(template, tuple(message["role"] for message in chat.messages), tuple(special))
        if frame is not None and (spans := frame.spans(chat, text)) is not None:
            return [spans[number] for number in numbers]
    finder = TurnFinder(template, chat, text, special)
    anchors = Anchors.of(template, chat, text) if len(numbers) > 1 or len(chat.messages) > 2 else None
    if anchors is None:
        return [finder.turn(number) for number in numbers]
    kinds: _Kinds = {} if switched else _kinds(template)
    places = _Places(chat, text, anchors, kinds, finder.turn)
    return [places.turn(number) for number in numbers]


def _is_switched(text: str) -> bool:
    return any(text.count(switch) > text.count(f"<{switch}>") for switch in _SWITCHES)


@cache
def _kinds(template: ChatTemplate) -> _Kinds:
    return {}


@dataclass(frozen=True)
class _Places:
    chat: Conversation
    text: str
    anchors: Anchors
    kinds: _Kinds
    find: Callable[[int], Span]

    def turn(self, number: int) -> Span:
        start, end = self._known_start(number), self._known_end(number)
        if start is None or end is None:
            start, end = self.find(number)
            self._keep(number, start, end)
        return start, end

    def _known_start(self, number: int) -> int | None:
        between = self._between(number - 1)
        offset = self.kinds.get(("start", *between)) if between else None
        return None if offset is None else self._tail(number - 1) + offset

    def _known_end(self, number: int) -> int | None:
        if number == len(self.chat.messages) - 1:
            return len(self.text)
        between = self._between(number)
        offset = self.kinds.get(("end", *between)) if between else None
        return None if offset is None else self._tail(number) + offset

    def _keep(self, number: int, start: int, end: int) -> None:
        if len(self.kinds) > _KEPT:
            self.kinds.clear()
        for what, before, place in (("start", number - 1, start), ("end", number, end)):
            between = self._between(before)
            if between and self._tail(before) <= place <= self._tail(before) + len(between[-1]):
                self.kinds[(what, *between)] = place - self._tail(before)

    def _between(self, number: int) -> tuple[str, ...] | None:
        """(roles of message ``number`` and the next, the text between their anchors)."""
        messages = self.chat.messages
        if not 0 <= number < len(messages) - 1 or "tool_calls" in messages[number]:
            return None
        tail, head = self.anchors.tails[number], self.anchors.heads[number + 1]
        if tail is None or head is None or tail > head:
            return None
        return messages[number]["role"], messages[number + 1]["role"], self.text[tail:head]

    def _tail(self, number: int) -> int:
        tail = self.anchors.tails[number]
        assert tail is not None, "as _between has found"
        return tail


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the texts of a conversation of certain roles.

    Attributes:
        pieces: one before each text, and one behind the last.
        offsets: message -> where its turn begins, from its text's beginning, and ends, from its text's end.
    """

    pieces: Sequence[str]
    offsets: dict[int, Span]

    def spans(self, chat: Conversation, text: str) -> dict[int, Span] | None:
        """The turns of ``chat`` in ``text``; None if that is not the frame with the messages' texts in it."""
        at, found = len(self.pieces[0]), {}
        if not text.startswith(self.pieces[0]):
            return None
        for number, (message, piece) in enumerate(zip(chat.messages, self.pieces[1:], strict=True)):
            forms = _forms(message["content"])
            length = next(
                (len(f) for f in forms if text.startswith(f, at) and text.startswith(piece, at + len(f))), None
            )
            if length is None:
                return None
            if number in self.offsets:
                before, behind = self.offsets[number]
                found[number] = at + before, at + length + behind
            at += length + len(piece)
        return found if at == len(text) else None


def _forms(content: str) -> Iterator[str]:
    """The content as templates write it, the usual first."""
    yield content
    yield content.strip()
    yield content.rstrip()
    yield content.lstrip()


@lru_cache(maxsize=4096)
def _frame(template: ChatTemplate, roles: tuple[str, ...], special: tuple[str, ...]) -> _Frame | None:
    """The frame of conversations of these roles, None where the template has none that can be told."""
    contents = [f"q{number}mark{number}q" for number in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    chat = Conversation(messages, [role == "assistant" for role in roles])
    try:
        text = template.render(messages)
        turns = {
            n: TurnFinder(template, chat, text, special).turn(n) for n, trained in enumerate(chat.trained) if trained
        }
    except ValueError:
        return None
    places = [text.find(content) for content in contents]
    ends = [at + len(content) for at, content in zip(places, contents, strict=True)]
    if -1 in places or sorted(places) != places or any(text.count(content) > 1 for content in contents):
        return None
    pieces = [text[a:b] for a, b in zip([0, *ends], [*places, len(text)], strict=True)]
    return _Frame(pieces, {n: (start - places[n], end - ends[n]) for n, (start, end) in turns.items()})
