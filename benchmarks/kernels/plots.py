"""Plots of a run's record, where matplotlib is installed. Each says in its title what was measured, on what and when.

python -m benchmarks.kernels.plots RECORD.json    draws beside it
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.kernels.measure import Row
from benchmarks.kernels.report import DTYPE, place

_COLUMNS = 3
_VERSIONS = ("torch", "triton", "bitsandbytes")
_GREEN, _RED, _BLUE = "#0b6e4f", "#d1495b", "#3d5a80"
_OF_CONTENDERS = {"qsharded": _GREEN, "compiled": _GREEN, "triton": "#6bbf9c", "bitsandbytes": _RED, "torchao": _BLUE}
_OF_OTHERS = "#9a9a9a"
_OF_WEIGHTS = (_GREEN, _RED, _BLUE, "#edae49", "#8d6a9f", "#5fa8a0", "#a05f2c", "#404040", "#b0b0b0")
_TICKS = [4**power for power in range(8)]

Draw = Callable[[Any, list[Row]], None]


def save(record: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draws what the record's rows hold: the products' speed-up over the baseline against M, a panel a weight; and the
    fraction of the limit reached, a panel an operation.

    Raises:
        ImportError: matplotlib is not installed.
    """
    timed = [row for row in map(Row.from_record, record["rows"]) if row.times is not None]
    operations, products = defaultdict(list), defaultdict(list)
    for row in timed:
        operations[row.op].append(row)
        if row.speedup is not None:
            products[f"{row.op} {row.N} x {row.K}"].append(row)
    drawings: list[tuple[dict[str, list[Row]], Draw]] = [(products, _speedup), (operations, _fractions)]
    drawn = {path: drawing for path, drawing in zip(paths(folder, name), drawings, strict=True) if drawing[0]}
    return [_draw(path, title(record), *drawing) for path, drawing in drawn.items()]


def paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Where the plots of a record of that name lie: speed-ups, fractions of the limit."""
    return folder / f"{name}_speedup.png", folder / f"{name}_fraction.png"


def remove(folder: Path, name: str) -> None:
    """Removes the plots of an earlier record of that name."""
    for path in paths(folder, name):
        path.unlink(missing_ok=True)


def title(record: dict[str, Any]) -> str:
    """Device, dtype, date, commit and versions."""
    versions = [f"{package} {record['versions'][package]}" for package in _VERSIONS if package in record["versions"]]
    driver = [f"driver {record['driver']}"] if record.get("driver") else []
    dtype, commit = record.get("dtype", DTYPE), record.get("commit") or "unknown"
    return f"{place(record)}, {dtype}, {record['date']}, commit {commit}\n" + ", ".join([*versions, *driver])


def _draw(path: Path, heading: str, panels: dict[str, list[Row]], draw: Draw) -> Path:
    from matplotlib.figure import Figure  # the class alone: no window, no state

    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    height = 3.2 if draw is _speedup else max(3.2, 0.7 * max(len(_weights(rows)) for rows in panels.values()))
    figure = Figure(figsize=(4.6 * columns, height * lines), layout="constrained")
    figure.suptitle(heading, fontsize="small")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        draw(axes, rows)
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if draw is _speedup:  # curves are compared across panels
        top = max(axes.get_ylim()[1] for axes in grid[: len(panels)])
        for axes in grid[: len(panels)]:
            axes.set_ylim(0, top)
    figure.savefig(path, dpi=110)
    return path


def _speedup(axes: Any, rows: list[Row]) -> None:
    baseline = next(row.contender for row in rows if row.speedup == 1)
    axes.axhline(1, color="grey", linestyle="--", linewidth=1, label=baseline)
    for contender in _contenders(rows):
        if contender != baseline:
            points = sorted((row.M, row.speedup) for row in rows if row.contender == contender)
            colour = _OF_CONTENDERS.get(contender, _OF_OTHERS)
            axes.plot(*zip(*points, strict=True), marker=".", label=contender, color=colour)
    _rows_of_x(axes, rows)
    axes.set_ylabel(f"speed-up over {baseline}")
    axes.legend(fontsize="x-small", frameon=False)


def _fractions(axes: Any, rows: list[Row]) -> None:
    """Bars for each weight, or, where there are rows of x, a curve of the first contender's for each weight."""
    (_fraction_curves if rows[0].M is not None else _fraction_bars)(axes, rows)


def _fraction_bars(axes: Any, rows: list[Row]) -> None:
    weights, contenders = _weights(rows), _contenders(rows)
    thickness = 0.85 / len(contenders)
    for i, contender in enumerate(contenders):
        fractions = {(row.N, row.K): row.fraction for row in rows if row.contender == contender}
        places = [place + (i + 0.5) * thickness for place, weight in enumerate(weights) if weight in fractions]
        colour = _OF_CONTENDERS.get(contender, _OF_OTHERS)
        bar = axes.barh(places, fractions.values(), height=0.92 * thickness, color=colour, label=contender)
        axes.bar_label(bar, labels=[f"{fraction:.0%}" for fraction in fractions.values()], padding=2, fontsize=6)
    axes.set_yticks([place + 0.425 for place in range(len(weights))], [f"{N} x {K}" for N, K in weights])
    axes.tick_params(axis="y", length=0, labelsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="fraction of the limit", xlim=(0, 1.1))
    _legend_below(axes)


def _fraction_curves(axes: Any, rows: list[Row]) -> None:
    ours = [row for row in rows if row.contender == rows[0].contender]
    for (N, K), colour in zip(_weights(ours), cycle(_OF_WEIGHTS), strict=False):
        points = sorted((row.M, row.fraction) for row in ours if (row.N, row.K) == (N, K))
        axes.plot(*zip(*points, strict=True), marker=".", label=f"{N} x {K}", color=colour)
    _rows_of_x(axes, rows)
    axes.set(ylabel=f"fraction of the limit, {ours[0].contender}", ylim=(0, 1.1))
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5}  # clear of the axis' label
    axes.legend(fontsize="x-small", frameon=False, ncols=4, **place)


def _rows_of_x(axes: Any, rows: list[Row]) -> None:
    Ms = [row.M for row in rows if row.M is not None]
    axes.set_xscale("log", base=2)
    axes.set_xticks([tick for tick in _TICKS if min(Ms) <= tick <= max(Ms)] or Ms)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rows of x (M)")


def _weights(rows: list[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row.N, row.K) for row in rows))


def _contenders(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.contender for row in rows))


def main() -> None:
    path = Path(sys.argv[1])
    print(*save(json.loads(path.read_text()), path.parent, path.stem))


if __name__ == "__main__":
    main()
