"""``python -m qsharded.inspect PATH``: what a checkpoint or an adapter holds, and whether it is sound."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from qsharded.checkpoint.report import Report, inspect_path
from qsharded.cli.command import errors_named
from qsharded.config import check_values, option, parse
from qsharded.distributed.world import World

_what = partial(option, group="What is inspected")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Say what a folder holds: its format, the bytes of each class of tensors, the SHA-256 of each file, and what is
    wrong with it.

    `qsharded inspect PATH` is short for --path PATH. It reads every byte once, a few megabytes at a time, and
    looks for values that are not finite, files that are cut off, and tensors that are missing, unexpected, or of
    another shape than config.json says. The exit status is 1 where something is wrong.
    """

    prog: ClassVar[str] = "qsharded.inspect"
    example: ClassVar[str] = "qsharded inspect output/adapter"

    path: str = _what(
        "Model (in 16 bits, or packed by qsharded or bitsandbytes), training checkpoint, adapter, or safetensors file.",
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        check_values(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(["--path", *words] if words and not words[0].startswith("-") else words, InspectConfig)
    with errors_named(config.prog, World.single_process(torch.device("cpu")), (ValueError, OSError)):
        report = inspect_path(Path(config.path))
    print(_text(config.path, report), end="")
    raise SystemExit(bool(report.problems))


def _text(path: str, report: Report) -> str:
    total = sum(report.classes.values())
    lines = [f"{path}: {report.kind}", "", "bytes"]
    lines += [f"  {name:<26}{size:>18,}" for name, size in sorted(report.classes.items())]
    lines += [f"  {'in all':<26}{total:>18,}", "", "files (SHA-256, bytes)"]
    for file in report.files:
        vouched = f"  as {file.vouched} says" if file.vouched else ""
        lines.append(f"  {file.sha256}  {file.size:>15,}  {file.name}{vouched}")
    return "\n".join([*lines, "", *(f"note: {note}" for note in report.notes), *_verdict(report)]) + "\n"


def _verdict(report: Report) -> list[str]:
    if not report.problems:
        return ["sound"]
    first, *others = report.problems
    more = [f"  then: {problem}" for problem in others[:9]]
    return [f"DAMAGED: {first}", *more, *([f"  and {len(others) - 9} more"] if len(others) > 9 else [])]


if __name__ == "__main__":
    main()
