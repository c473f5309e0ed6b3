"""What a run measures of its model: the evaluation sets by name, and the measures that they give."""

import re
from collections.abc import Sequence
from pathlib import Path

EXACT_MATCH = "exact_match"
_NAMED = re.compile(r"([A-Za-z0-9][\w-]*)=(.+)", re.DOTALL)


def eval_sets(given: Sequence[str]) -> dict[str, str]:
    """The sources of ``--eval-dataset`` by name: NAME=PATH, a file's name without its ending, or "" of one alone.

    Raises:
        ValueError: two have the same name, or one is empty.
    """
    if not all(given):
        raise ValueError("--eval-dataset names an empty set beside others: leave it out")
    named = [_named(text, alone=len(given) == 1) for text in given]
    sets: dict[str, str] = {}
    for name, source in named:
        if name in sets:
            raise ValueError(
                f"--eval-dataset has two sets called {name!r}, {sets[name]} and {source}: give each a name of its own, "
                "as NAME=PATH"
            )
        sets[name] = source
    return sets


def _named(text: str, alone: bool) -> tuple[str, str]:
    found = _NAMED.fullmatch(text)
    if found and not Path(text).exists():
        return found[1], found[2]
    return ("" if alone else Path(text).name.partition(".")[0]), text


def measure(set_name: str, what: str) -> str:
    """What a measure of an evaluation set is called in logs, such as eval_loss or eval_NAME_loss."""
    return "_".join(filter(None, ("eval", set_name, what)))


def measures(set_names: Sequence[str], *, exact_match: bool) -> list[str]:
    """All that is measured on these sets."""
    on_sets = [measure(name, what) for name in set_names for what in ("loss", "perplexity")]
    return on_sets + [EXACT_MATCH] * exact_match


def is_better_high(name: str) -> bool:
    """Whether a larger value of this measure is the better one."""
    return name == EXACT_MATCH
