"""Plots as a PNG, drawn by matplotlib: for slides and chats that show neither a page nor an SVG."""

import importlib.util
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from qsharded.report.curves import smoothed, thinned, tick_text
from qsharded.report.plot import Curve, Plot
from qsharded.report.style import COLOURS, LIGHT

_WIDTH, _HEIGHT, _PAD, _DPI = 9.0, 2.4, 0.12, 120  # inches of the picture, of a row of it, and around plots
_STYLE: dict[str, Any] = {"solid_capstyle": "round", "solid_joinstyle": "round"}


def refuse_missing(option: str) -> None:
    """Raise ValueError where there is no matplotlib; ``option`` asked for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{option} needs a package that is not installed: pip install 'qsharded[report]'")


def draw(plots: Sequence[Plot]) -> bytes:
    """The first plot over the whole width, the others in two columns below it; the scales are those of the SVGs."""
    from matplotlib.figure import Figure  # the class alone: no window, no state
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.text import Text

    rows = 2 + len(plots) // 2  # the first one is two rows high
    figure = Figure(figsize=(_WIDTH, _HEIGHT * rows), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD))
    grid = figure.add_gridspec(rows, 2)
    for number, plot in enumerate(plots):
        row, column = divmod(number - 1, 2)
        place = grid[row + 2, column] if number else grid[:2, :]
        _draw(figure.add_subplot(place), plot)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a run's name is no formula, whatever is in it
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: Any, plot: Plot) -> None:
    axes.set_title(plot.title, loc="left", fontsize="medium", fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.tick_params(labelsize="small", length=0)
    scales = plot.scales()
    if scales is None:
        axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)
        return axes.set_axis_off()
    across, up = scales
    if up.log:
        axes.set_yscale("log")
    axes.set(xlim=(across.low, across.high), ylim=(up.low, up.high))
    axes.set_yticks(up.ticks, [tick_text(tick, up) for tick in up.ticks])
    axes.set_yticks([], minor=True)
    handles = [_curve(axes, number, curve) for number, curve in enumerate(plot.curves)]
    for step, said in plot.marks:
        axes.axvline(step, color="0.6", linestyle=":", linewidth=1)
        axes.annotate(said, (step, 1), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize="small")
    if len(handles) > 1:
        names = [curve.name for curve in plot.curves]
        axes.legend(handles, names, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize="small")


def _curve(axes: Any, number: int, curve: Curve) -> Any:
    """Its line, for the legend: the mean where one is drawn over what is noisy."""
    colour, mean = LIGHT[number % COLOURS], smoothed(curve.points) if curve.noisy else []
    line = "--" if curve.dashed else ":" if number >= COLOURS else "-"
    if mean:
        axes.plot(*_columns(curve), color=colour, alpha=0.35, linewidth=0.8, **_STYLE)
        return axes.plot(*zip(*thinned(mean), strict=True), line, color=colour, **_STYLE)[0]
    marker = "o" if curve.dots or len(curve.points) == 1 else None
    return axes.plot(*_columns(curve), line, color=colour, marker=marker, markersize=4, mfc="white", **_STYLE)[0]


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    points = thinned(curve.points)
    return [step for step, _ in points], [value for _, value in points]
