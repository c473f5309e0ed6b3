"""``qsharded NAME ...``, or ``python -m qsharded NAME ...``: one command for all of them.

``qsharded train`` starts a rank for each GPU; the others run as ``python -m qsharded.NAME`` does. Nothing slow is
imported here: each command answers signals before its own imports.
"""

import difflib
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import qsharded
from qsharded.utils.closed_output import end_quietly

_PROG = "qsharded"


@dataclass(frozen=True)
class Subcommand:
    """``module`` runs it, with ``first`` in front of its arguments."""

    module: str
    about: str
    first: tuple[str, ...] = ()


SUBCOMMANDS = {
    "train": Subcommand("qsharded.train", "fine-tune a model, on all GPUs of this machine"),
    "plan": Subcommand(
        "qsharded.train", "what a run takes, and what would fit, before anything is loaded", ("--dry-run",)
    ),
    "chat": Subcommand("qsharded.chat", "talk with a model, with or without an adapter"),
    "generate": Subcommand("qsharded.generate", "answer prompts, with or without an adapter"),
    "merge": Subcommand("qsharded.merge", "fold an adapter into its base model"),
    "quantize": Subcommand("qsharded.quantize", "pack a checkpoint once for all runs"),
    "compare": Subcommand("qsharded.compare", "how runs differ: settings, figures and curves"),
    "preview": Subcommand("qsharded.preview", "rows as the model will see them, before a run"),
    "inspect": Subcommand("qsharded.inspect", "what a folder or file holds, and whether it is sound"),
    "launch": Subcommand("qsharded.launch", "torchrun, with what runs on several nodes need"),
    "doctor": Subcommand("qsharded.doctor", "versions, GPUs, kernels, the exact gather, bandwidth"),
}
_LAUNCHED = "train"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first of ``argv`` names, by default of the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        (sys.stdout if words else sys.stderr).write(help_text())
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(f"{_PROG} {qsharded.__version__}")
        return
    try:
        _run(*words)
    except BrokenPipeError:
        end_quietly()


def help_text() -> str:
    """What there is, a line each."""
    lines = [f"  {name:<10}{one.about}" for name, one in SUBCOMMANDS.items()]
    head = [f"usage: {_PROG} COMMAND [--KEY VALUE ...]", "", "commands"]
    return "\n".join([*head, *lines, "", f"{_PROG} COMMAND --help says more; {_PROG} --version the version"]) + "\n"


def _run(name: str, *argv: str) -> None:
    if name not in SUBCOMMANDS:
        print(f"{_PROG}: error: {_unknown(name)}", file=sys.stderr)
        raise SystemExit(2)
    if name == _LAUNCHED:
        from qsharded.cli.launch import train  # here: only this needs the options of training

        train(argv)
    else:
        run_module(SUBCOMMANDS[name].module, [*SUBCOMMANDS[name].first, *argv])


def run_module(module: str, argv: Sequence[str]) -> None:
    """Run ``python -m module argv`` in this process."""
    sys.argv[1:] = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"{_PROG} --help lists them"
    return f"there is no command {name!r}; {hint}"


if __name__ == "__main__":
    main()
