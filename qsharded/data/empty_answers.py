"""Answers that say nothing: trained, they would teach the model to end its turn at once."""

import re
from dataclasses import replace

from qsharded.data.formats import Conversation, PromptCompletion, Record
from qsharded.data.messages import REASONING_KEYS, Message
from qsharded.data.omissions import EMPTY_ANSWER, Omission

_EMPTY_BLOCK = re.compile(r"<think>\s*</think>")


def without_empty_answers(record: Record) -> tuple[Record | None, Omission | None]:
    """(the row with its empty answers untrained, None if nothing else was to be trained on; the first of them).

    An answer is empty that has no text, no reasoning and calls no tool.
    """
    match record:
        case Conversation():
            return _without(record)
        case PromptCompletion(prompt, completion) if not completion.strip():
            return None, Omission(EMPTY_ANSWER, None, prompt[-60:])
    return record, None


def _without(chat: Conversation) -> tuple[Record | None, Omission | None]:
    empty = [wanted and _is_empty(message) for message, wanted in zip(chat.messages, chat.trained, strict=True)]
    if True not in empty:
        return chat, None
    trained = [wanted and not nothing for wanted, nothing in zip(chat.trained, empty, strict=True)]
    first = empty.index(True)
    asked = chat.messages[first - 1].get("content", "") if first else ""
    return replace(chat, trained=trained) if any(trained) else None, Omission(EMPTY_ANSWER, first, asked[-60:])


def _is_empty(message: Message) -> bool:
    says = _EMPTY_BLOCK.sub("", message.get("content", "")).strip()
    return not says and not any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
