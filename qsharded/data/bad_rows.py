"""What a run does about rows that cannot be used: it names them all at once and stops, or goes on without them."""

from collections.abc import Sequence

SHOWN = 20
"""How many reasons are kept and listed."""
_LONGEST = 1_000  # characters of one: it quotes keys and values of the row, and what a chat template says


def clipped(reason: str) -> str:
    """A reason that a row, or a template, cannot make as long as it likes."""
    more = len(reason) - _LONGEST
    return reason if more <= 0 else f"{reason[:_LONGEST]}... and {more:,} more characters"


def refuse_bad_rows(count: int, reasons: Sequence[str], skip: int, *, all_read: bool) -> None:
    """Stop for bad rows, once nothing more is to be said of them.

    Args:
        count: bad rows so far.
        reasons: ``file:line: reason`` of the first :data:`SHOWN`.
        skip: how many may be left out.
        all_read: whether there may be more.

    Raises:
        ValueError: there are more than ``skip``, and all rows are read, or as many are bad as a message lists.
    """
    if count <= skip or (not all_read and count < SHOWN):
        return
    if count == 1:
        raise ValueError(f"{reasons[0]} (--bad-rows skip:1 goes on without it)")
    at_least, them = ("", "them") if all_read else ("at least ", "so many")
    raise ValueError(
        f"{at_least}{count:,} rows cannot be used:\n{listed(count, reasons)}\n"
        f"(--bad-rows skip:{count} goes on without {them})"
    )


def bad_rows_note(count: int, reasons: Sequence[str]) -> list[str]:
    """The lines on rows that were skipped, none if there were none."""
    if not count:
        return []
    rows = "row is" if count == 1 else "rows are"
    return [f"note: {count:,} bad {rows} left out (--bad-rows):\n{listed(count, reasons)}"]


def listed(count: int, reasons: Sequence[str]) -> str:
    """The reasons, a line for each, and how many more there are."""
    more = count - len(reasons)
    return "\n".join([f"  {reason}" for reason in reasons] + [f"  and {more:,} more"] * bool(more))
