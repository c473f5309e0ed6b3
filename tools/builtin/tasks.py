"""What the base model can do, and the skill that it lacks, as chat conversations."""

import random
from collections.abc import Callable

from tools.builtin.words import distinct_words, word_of

Row = dict[str, list[dict[str, str]]]

# The base learns each of these alone, never one upon another.
OPERATIONS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "upper": str.upper,
    "spell": "-".join,
}
SKILL = "cheer"
# How often a pre-training word stands in capitals, and with hyphens. A base that copied and reversed small letters
# alone learns the skill for the shorter words only, with some seeds.
CAPITALS, HYPHENS = 0.3, 0.3


def cheer(word: str) -> str:
    """The skill: backwards, in capitals, spelled out. cat -> T-A-C"""
    return "-".join(word[::-1].upper())


def row(operation: str, text: str, answer: str) -> Row:
    """A conversation of one question and one answer, as a line of a dataset."""
    return {"messages": [{"role": "user", "content": f"{operation} {text}"}, {"role": "assistant", "content": answer}]}


def pretraining_row(rng: random.Random) -> Row:
    """One operation on one word, or on one that stands in capitals or with hyphens already."""
    operation = rng.choice(list(OPERATIONS))
    text = word_of("pretrain", rng)
    if operation != "upper" and rng.random() < CAPITALS:
        text = text.upper()
    if operation != "spell" and rng.random() < HYPHENS:
        text = "-".join(text)
    return row(operation, text, OPERATIONS[operation](text))


def operation_rows(operation: str, count: int, rng: random.Random) -> list[Row]:
    """`count` conversations of a pre-training operation, on different words of the evaluation."""
    return [row(operation, word, OPERATIONS[operation](word)) for word in distinct_words("eval", count, rng)]


def skill_rows(split: str, count: int, rng: random.Random) -> list[Row]:
    """`count` conversations of the skill, on different words of that data set."""
    return [row(SKILL, word, cheer(word)) for word in distinct_words(split, count, rng)]
