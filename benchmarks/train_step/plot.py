"""tokens/s of each case, a bar a library."""

from pathlib import Path
from typing import Any

_COLOURS = {"qsharded": "#0b6e4f", "unsloth": "#d1495b", "transformers": "#3d5a80"}


def save(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw what ``rows`` hold to ``path``; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # the class alone: no window, no state
    except ImportError:
        return
    cases = list(dict.fromkeys(row["case"] for row in rows))
    libraries = list(dict.fromkeys(row["who"] for row in rows))
    figure = Figure(figsize=(7.5, 0.9 + 0.55 * len(cases)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(libraries)
    for number, who in enumerate(libraries):
        own = {row["case"]: row["tokens_per_second"] for row in rows if row["who"] == who and "failed" not in row}
        places = [cases.index(case) + (number - (len(libraries) - 1) / 2) * height for case in own]
        bars = axes.barh(places, list(own.values()), height, label=who, color=_COLOURS[who])
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    figure.suptitle(title, fontsize="medium")
    axes.margins(x=0.15)
    figure.legend(loc="outside lower center", ncols=len(libraries), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def title(record: dict[str, Any]) -> str:
    """Shape, card, day and versions."""
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "triton"))
    return f"{record['shape']}, {record['gpu']}, {record['date']}, {versions}, bf16"
