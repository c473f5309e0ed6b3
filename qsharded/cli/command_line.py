"""The command line that goes on with this run, as its user typed it, for messages from which it is copied."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Again = Callable[..., str]  # :func:`command` of this run: takes the options to change

_FIRST_START_ONLY = "overwrite_output_dir"


def command(argv: Sequence[str], ranks: int, **options: str) -> str:
    """The command of this process, or of the torchrun that started it, with some options changed.

    Args:
        argv: the command's own arguments.
        ranks: how many run, for where nobody can be seen who started them.
        options: field name to value; they stand in the place of what ``argv`` says of them.
    """
    words = [*_start(argv, ranks), *_kept(argv, {*options, _FIRST_START_ONLY})]
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return shlex.join(words)


def _start(argv: Sequence[str], ranks: int) -> list[str]:
    """All that stands in front of the command's own arguments."""
    words = _launcher() or list(sys.orig_argv)
    if not argv:
        return words
    if words[-len(argv) :] == list(argv):
        return words[: -len(argv)]
    # called from Python code, or where no process can be looked at
    start = ["python"] if ranks == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, "-m", "qsharded.train"]


def _launcher() -> list[str]:
    """The command line of torchrun or ``qsharded train`` where it started this process; it ends with our arguments."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    try:
        read = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    words = [os.fsdecode(word) for word in read.split(b"\0")[:-1]]
    # these name their Python themselves
    is_script = len(words) > 1 and Path(words[1]).name in ("torchrun", "qsharded")
    return words[1:] if is_script else words


def _kept(argv: Sequence[str], replaced: set[str]) -> Iterator[str]:
    """``argv`` without the options that are replaced, and without the value that may follow each of them."""
    is_value = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in replaced:
            is_value = not equals
        elif is_value and not word.startswith("--"):
            is_value = False
        else:
            is_value = False
            yield word
