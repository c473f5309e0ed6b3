"""The command line that goes on with this run, as its user typed it."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# What only the first start is for: the option, and how many values may follow it.
_REPLACED = ("--resume-from-checkpoint", "--overwrite-output-dir")


def command_to_go_on(argv: Sequence[str]) -> str:
    """The command of this process, or of the torchrun that started it, that resumes from the newest checkpoint.

    Args:
        argv: the command's own arguments.
    """
    words = [*_start(argv), *_kept(argv), "--resume-from-checkpoint", "auto"]
    return shlex.join(words)


def _start(argv: Sequence[str]) -> list[str]:
    """All that stands in front of the command's own arguments."""
    words = _launcher() or list(sys.orig_argv)
    if argv and words[-len(argv) :] == list(argv):
        return words[: -len(argv)]
    # called from Python code, or where no process can be looked at
    return [sys.executable, "-m", "qsharded.train"] if argv else words


def _launcher() -> list[str]:
    """torchrun's command line where it started this process; it ends with the command and its arguments."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    try:
        read = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    words = [os.fsdecode(word) for word in read.split(b"\0")[:-1]]
    is_script = len(words) > 1 and Path(words[1]).name == "torchrun"  # which names its Python itself
    return words[1:] if is_script else words


def _kept(argv: Sequence[str]) -> Iterator[str]:
    is_value = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") in _REPLACED:
            is_value = not equals
        elif is_value and not word.startswith("--"):
            is_value = False
        else:
            is_value = False
            yield word
