"""Runs of six steps on a few rows of the built-in data, for tests of what a run leaves."""

import tempfile
from functools import cache
from pathlib import Path

from tests.training.test_divergence import BUILTIN, arguments


@cache
def rows(name: str, count: int) -> Path:
    """The first rows of a built-in file, in a file of that name."""
    lines = (BUILTIN / name).read_text(encoding="utf-8").splitlines(keepends=True)
    path = Path(tempfile.mkdtemp(prefix="rows")) / name
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


def short(output: Path, *more: str, steps: int = 6) -> list[str]:
    """As ``arguments``, on 200 rows, for so many steps."""
    words = arguments(output, *more)
    words[words.index("--dataset") + 1] = str(rows("train.jsonl", 200))
    words[words.index("--max-steps") + 1] = str(steps)
    return words
