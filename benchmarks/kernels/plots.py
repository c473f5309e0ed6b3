"""Plots of a run, where matplotlib is installed: a panel a weight's shape, a colour a contender."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.kernels.measure import Row

_COLUMNS = 3
_COLOURS = ("#0b6e4f", "#7f7f7f", "#d1495b", "#3d5a80", "#edae49", "#8d6a9f")  # ours first, and told from grey by light


def save(rows: list[Row], folder: Path) -> list[Path]:
    """Draws what the rows hold: speed-up over the baseline against M, and the fraction of the limit reached.

    Raises:
        ImportError: matplotlib is not installed.
    """
    products = [row for row in rows if row.M is not None and row.speedup is not None and row.op == "linear"]
    others = [row for row in rows if row.M is None and row.fraction is not None]
    by_rows = [row for row in products if row.fraction is not None]
    drawings: dict[str, tuple[list[Row], Callable[[Any, list[Row]], None]]] = {
        "speedup": (products, _speedup),
        "fraction": (others or by_rows, _fractions),
    }
    return [_draw(folder / f"kernels_{name}.png", *drawing) for name, drawing in drawings.items() if drawing[0]]


def _draw(path: Path, rows: list[Row], draw: Callable[[Any, list[Row]], None]) -> Path:
    """One panel for each shape and operation."""
    from matplotlib.figure import Figure  # the class alone: no window, no state

    panels = list(dict.fromkeys((row.op, row.N, row.K) for row in rows))
    lines = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(4 * min(_COLUMNS, len(panels)), 2.8 * lines + 0.5), layout="constrained")
    grid = list(figure.subplots(lines, min(_COLUMNS, len(panels)), squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        draw(axes, [row for row in rows if (row.op, row.N, row.K) == panel])
        axes.set_title(f"{panel[0]} {panel[1]} x {panel[2]}", fontsize="medium")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if rows[0].M is not None:  # curves are compared across panels
        top = max(axes.get_ylim()[1] for axes in grid[: len(panels)])
        for axes in grid[: len(panels)]:
            axes.set_ylim(0, top)
    figure.savefig(path, dpi=110)
    return path


def _speedup(axes: Any, rows: list[Row]) -> None:
    for contender, colour in _coloured(rows):
        points = [(row.M, row.speedup) for row in rows if row.contender == contender]
        axes.plot(*zip(*points, strict=True), marker=".", label=contender, color=colour)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows of x (M)", ylabel="speed-up over bf16")
    axes.legend(fontsize="x-small", frameon=False)


def _fractions(axes: Any, rows: list[Row]) -> None:
    for (contender, colour), row in zip(_coloured(rows), rows, strict=False):
        bar = axes.barh(contender, row.fraction, color=colour)
        axes.bar_label(bar, labels=[f"{row.fraction:.0%}"], padding=2, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="fraction of the limit", xlim=(0, 1.12))


def _coloured(rows: Iterable[Row]) -> Iterable[tuple[str, str]]:
    contenders = dict.fromkeys(row.contender for row in rows)
    return zip(contenders, _COLOURS * (len(contenders) // len(_COLOURS) + 1), strict=False)
