"""The option that says what rows do that cannot be used."""

import re
from typing import Any

from qsharded.config.options import option


def bad_rows_option(group: str) -> Any:
    """``--bad-rows``."""
    help = (
        "What rows do that cannot be used: stop the run, which names them all at once, or, with skip:N, are left out, "
        "up to N in each dataset, and listed."
    )
    return option(help, "stop", group=group, metavar="stop|skip:N")


def skipped_bad_rows(bad_rows: str) -> int:
    """How many rows of each dataset may be left out as bad.

    Raises:
        ValueError: it is neither ``stop`` nor ``skip:N``.
    """
    if not re.fullmatch(r"stop|skip:\d{1,18}", bad_rows):
        raise ValueError(f"--bad-rows must be stop, or skip:N with a number N, got {bad_rows!r}")
    return 0 if bad_rows == "stop" else int(bad_rows.removeprefix("skip:"))
