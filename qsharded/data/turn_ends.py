"""Whether the end of each trained turn is trained, which is how a model learns to stop.

A template may mark the content alone by ``{% generation %}``; and where turns end in plain text, EOS stands behind the
last one only.
"""

from collections.abc import Sequence
from functools import cache

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.omissions import PLAIN_END, UNMARKED_END, UNTRAINED_END, Omission
from qsharded.data.turns import usual_frame


def with_turn_ends(
    template: ChatTemplate,
    text: str,
    spans: Sequence[Span],
    special: tuple[str, ...],
    eos: Sequence[str],
    *,
    learn: bool = True,
) -> tuple[list[Span], list[Omission]]:
    """(the trained ``spans`` of ``text``, each with its turn's end where that follows it; what is to be told of that).

    Args:
        special: texts of all special tokens.
        eos: texts of those that end generation under any template.
        learn: add ends that follow spans; else only tell of them.
    """
    ends = _Ends(text, special, [*eos, *_usual_end(template, special)], learn)
    stops = [*(start for start, _ in spans[1:]), len(text)]
    found = [ends.of(span, stop) for span, stop in zip(spans, stops, strict=True)]
    return [span for span, _ in found], [one for _, one in found if one is not None]


class _Ends:
    def __init__(self, text: str, special: tuple[str, ...], ends: Sequence[str], learn: bool) -> None:
        self._text = text
        self._special = special
        self._ends = ends
        self._learn = learn

    def of(self, span: Span, stop: int) -> tuple[Span, Omission | None]:
        """The span with its turn's end, and what is to be told of it; ``stop``: where the next span starts."""
        start, end = span
        if self._is_special_end(start, end):
            return span, None
        behind = self._behind(start, end)
        if behind is None:
            return span, self._untrained(end, stop)
        if behind and not self._learn:
            return span, Omission(UNTRAINED_END, None, behind)
        end += len(behind)
        if not self._is_special_end(start, end) and stop < len(self._text):
            return (start, end), Omission(PLAIN_END, None, self._text[start:end][-40:])
        return (start, end), Omission(UNMARKED_END, None, behind) if behind else None

    def _is_special_end(self, start: int, end: int) -> bool:
        return self._text[start:end].rstrip().endswith(self._special)

    def _behind(self, start: int, end: int) -> str | None:
        """What of a turn's end follows the span: "" where the span has all of it, None where another text follows."""
        said = self._text[start:end]
        for one in self._ends:
            for had in range(len(one), -1, -1):
                if said.endswith(one[:had]) and self._text.startswith(one[had:], end):
                    return one[had:]
        return None

    def _untrained(self, end: int, stop: int) -> Omission | None:
        """Of a span with other text behind: the turn goes on in the next span unless it ends between them."""
        rest = self._text[end:stop]
        last = stop == len(self._text)
        if rest.strip() and (last or any(one in rest for one in self._ends)):
            return Omission(UNTRAINED_END, None, rest[:40])
        return None


@cache
def _usual_end(template: ChatTemplate, special: tuple[str, ...]) -> tuple[str, ...]:
    """What ends an answer in the simplest conversation, up to its special token if it has one; () if unknown."""
    frame = usual_frame(template)
    if frame is None:
        return ()
    ends = [frame[1].find(token) + len(token) for token in special if token in frame[1]]
    return (frame[1][: min(ends)] if ends else frame[1],)
