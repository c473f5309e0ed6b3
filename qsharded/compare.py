"""``python -m qsharded.compare RUN RUN ...``: how runs differ, in settings, figures and curves."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from qsharded.cli.command import errors_named
from qsharded.config import check_values, option, parse
from qsharded.distributed.world import World
from qsharded.report import png
from qsharded.report.comparison import Comparison, named
from qsharded.report.run_files import Run
from qsharded.utils.durable_files import write_whole

_what = partial(option, group="What is compared")
_out = partial(option, group="What is written")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare runs: print the settings in which they differ and their figures, and draw their curves.

    `qsharded compare RUN RUN ...` is short for --runs RUN RUN ...; a RUN is the --output-dir of qsharded train, whose
    run may still be going on. The page has all of it and needs nothing else; no path of this machine is in it.
    """

    prog: ClassVar[str] = "qsharded.compare"
    example: ClassVar[str] = "qsharded compare output/rank-8 output/rank-64 --html compared.html"

    runs: str | tuple[str, ...] = _what("Output folders of runs, two or more.", metavar="RUN ...")
    metric: str = _what(
        "Figure of metrics.jsonl that the first plot shows, such as loss, eval_loss or tokens_per_second.", "loss"
    )
    html: str | None = _out("File to write the page to.", None, metavar="FILE", unset="none")
    svg: str | None = _out("File to write the first plot to.", None, metavar="FILE", unset="none")
    png: str | None = _out("The same as a PNG, drawn by the package matplotlib.", None, metavar="FILE", unset="none")

    @property
    def folders(self) -> tuple[str, ...]:
        """Every run."""
        return (self.runs,) if isinstance(self.runs, str) else self.runs

    def __post_init__(self) -> None:
        check_values(self)
        if len(self.folders) < 2:
            raise ValueError(f"--runs must name two runs or more, got {', '.join(self.folders) or 'none'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(["--runs", *words] if words and not words[0].startswith("-") else words, CompareConfig)
    with errors_named(config.prog, World.single_process(torch.device("cpu")), (ValueError, OSError)):
        run(config)


def run(config: CompareConfig) -> None:
    """Print the comparison, and write its files.

    Raises:
        ValueError: a folder holds no run, no run has the figure, or a PNG is asked for and nothing can draw it.
    """
    if config.png:
        png.refuse_missing("--png")
    runs = [Run.read(Path(folder)) for folder in config.folders]
    comparison = Comparison(named(runs, config.folders))
    comparison.check(config.metric)
    print(comparison.text(), end="")
    if config.html:
        write_whole(Path(config.html), comparison.page(config.metric).encode())
    if config.svg:
        write_whole(Path(config.svg), comparison.plot(config.metric).file().encode())
    if config.png:
        write_whole(Path(config.png), png.draw([comparison.plot(config.metric)]))


if __name__ == "__main__":
    main()
