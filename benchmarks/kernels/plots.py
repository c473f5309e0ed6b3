"""Plots of a run, where matplotlib is installed."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.kernels.measure import Row


def save(rows: list[Row], folder: Path) -> list[Path]:
    """Draws what the rows hold: speed-up over the baseline against M, and each operation's fraction of the limit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # the class alone: no window, no state

    drawings = {"speedup": _speedup, "fraction": _fractions}
    paths = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        if draw(figure, rows):
            paths.append(folder / f"kernels_{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _speedup(figure: Any, rows: list[Row]) -> bool:
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.op == "linear" and row.M is not None and row.speedup is not None:
            curves[f"{row.contender} {row.N}x{row.K}"].append((row.M, row.speedup))
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", xlabel="rows of x (M)", ylabel="speed-up over bf16", title="x W^T with W in NF4")
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="grey", linewidth=0.8)
    if curves:
        axes.legend(fontsize="small")
    return bool(curves)


def _fractions(figure: Any, rows: list[Row]) -> bool:
    timed = [row for row in rows if row.fraction is not None]
    labels = [f"{row.op} {row.N}x{row.K}" + (f" M={row.M}" if row.M else "") + f" {row.contender}" for row in timed]
    figure.set_figheight(1.5 + 0.2 * len(timed))
    axes = figure.subplots()
    axes.barh(labels, [row.fraction for row in timed])
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    axes.set(xlabel="fraction of the limit", xlim=(0, 1), title="speed over this run's copy and matmul limits")
    return bool(timed)
