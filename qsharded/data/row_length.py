"""Rows that are certainly too long, found before their turns are looked for: that takes many times a row's memory."""

from collections.abc import Callable
from typing import Any

from qsharded.data.examples import Dataset
from qsharded.data.formats import Conversation, PromptCompletion, Record, Text
from qsharded.data.render import Rendered
from qsharded.data.tokenizer import Tokenizer

How = Callable[[Record], list[Rendered]]
_MARGIN = 2  # normalizers shorten some texts before they are cut into tokens


def without_long_rows(how: How, dataset: Dataset, tokenizer: Tokenizer, max_length: int) -> How:
    """``how``, but of a record that has more characters than ``max_length`` tokens can stand for it gives nothing, and
    the row is counted in ``dataset`` as dropped."""
    longest = max_length * tokenizer.longest_token * _MARGIN

    def render_short(record: Record) -> list[Rendered]:
        if _characters(record) > longest and _rendered_characters(record, tokenizer) > longest:
            dataset.dropped += 1
            return []
        return how(record)

    return render_short


def _characters(record: Record) -> int:
    match record:
        case Conversation():
            return sum(_in_strings(message) for message in record.messages)
        case PromptCompletion():
            return len(record.prompt) + len(record.completion)
        case Text():
            return len(record.text)


def _in_strings(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_in_strings, inner))


def _rendered_characters(record: Record, tokenizer: Tokenizer) -> int:
    """A template may leave out much of a conversation."""
    if isinstance(record, Conversation):
        return len(tokenizer.render(record.messages, tools=record.tools))
    return _characters(record)
