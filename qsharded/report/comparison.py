"""Several runs beside each other: the settings in which they differ, their figures, and their curves in one plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

from qsharded.report import figures
from qsharded.report.html import document, duration, figure, section, short, table, text
from qsharded.report.plot import Curve, Plot
from qsharded.report.run_files import Run
from qsharded.report.shareable import all_settings

_EXACT = ("learning_rate", "memory_gib")  # nothing to smooth
_NOT_SET = "\N{EN DASH}"


@dataclass(frozen=True)
class Comparison:
    """Runs, two or more, by names that tell them apart."""

    runs: dict[str, Run]

    def check(self, key: str) -> None:
        """Raise ValueError where no run has measured ``key``; what there is is named."""
        known = dict.fromkeys(name for run in self.runs.values() for row in run.rows for name in row if name != "step")
        if key not in known:
            raise ValueError(f"--metric {key!r} is in none of these runs' metrics.jsonl; they have {', '.join(known)}")

    @cached_property
    def differences(self) -> dict[str, list[str]]:
        """Setting -> its value in each run, of the settings that are not alike in all."""
        given = [self._settings(run) for run in self.runs.values()]
        keys = dict.fromkeys(key for one in given for key in one)
        found = {key: [text(one[key]) if key in one else _NOT_SET for one in given] for key in keys}
        return {key: values for key, values in found.items() if len(set(values)) > 1}

    def _settings(self, run: Run) -> dict[str, Any]:
        """With what no option says: the ranks, versions, and which rows and weights."""
        record = run.record
        others = {"ranks": record.get("ranks"), "hardware": figures.hardware(run), "commit": record.get("commit")}
        versions = {f"version of {name}": version for name, version in record.get("versions", {}).items()}
        prints = {f"fingerprint of the {name}": digest for name, digest in record.get("fingerprints", {}).items()}
        known = others | versions | prints
        return all_settings(run.settings) | {key: value for key, value in known.items() if value}

    @cached_property
    def figures(self) -> dict[str, list[str]]:
        """Figure -> its value in each run."""
        runs = list(self.runs.values())
        losses = {key: None for run in runs for key in run.measured if not key.endswith("perplexity")}
        rows = {"steps": [figures.steps(run) for run in runs]}
        rows["last loss"] = [figure("loss", run.last("loss")) for run in runs]
        for key in losses:
            rows[f"best {key}"] = [_best(run, key) for run in runs]
            rows[f"last {key}"] = [figure(key, run.last(key)) for run in runs]
        rows["tokens/s"] = [_or_none(figures.speed(run), short) for run in runs]
        rows["peak memory, GiB"] = [_or_none(_most(run, "memory_gib"), lambda value: f"{value:.1f}") for run in runs]
        rows["time"] = [_or_none(figures.seconds(run), duration) for run in runs]
        return rows

    def plot(self, key: str) -> Plot:
        """The curves of all runs."""
        of_training = any(key in row for run in self.runs.values() for row in run.training)
        kind = {"noisy": of_training and key not in _EXACT, "dots": not of_training}
        curves = [Curve(name, run.curve(key), **kind) for name, run in self.runs.items()]
        is_loss = key.endswith("loss")
        return Plot(f"{key} by step", curves, magnitudes=is_loss, from_zero=not is_loss)

    def text(self) -> str:
        """For the terminal: the differences, then the figures."""
        parts = [("settings that differ", self.differences), ("figures", self.figures)]
        return "\n".join(_columns(title, list(self.runs), rows) for title, rows in parts)

    def page(self, key: str) -> str:
        """All of it as one page; the plot of ``key`` comes first."""
        losses = [one for run in self.runs.values() for one in run.measured if one.endswith("loss")]
        keys = dict.fromkeys([key, "loss", *losses, "grad_norm", "learning_rate", "tokens_per_second", "memory_gib"])
        wide, *others = (self.plot(one).figure(wide=one == key, legend=one == key) for one in keys)
        head = f"<h1>{len(self.runs)} runs compared</h1>\n"
        differences = self._table(self.differences) or "<p>None: the runs have the same settings.</p>\n"
        body = section("Settings that differ", differences) + section("Figures", self._table(self.figures))
        plots = f'<div class="plots" style="margin-top:1.5rem">{wide}{"".join(others)}</div>\n'
        return document(f"Runs compared: {', '.join(self.runs)}", head + plots + body)

    def _table(self, rows: dict[str, list[str]]) -> str:
        cells = [[escape(name), *map(escape, values)] for name, values in rows.items()]
        return table(["", *self.runs], cells) if cells else ""


def named(runs: Sequence[Run], folders: Sequence[str]) -> dict[str, Run]:
    """The runs by their folders' names, longer ones where two are alike."""
    names = [run.name for run in runs]
    for parts in range(2, 9):
        if len(set(names)) == len(names):
            break
        names = ["/".join(folder.rstrip("/").split("/")[-parts:]) for folder in folders]
    return dict(zip(names, runs, strict=True))


def _best(run: Run, key: str) -> str:
    best = run.best(key)
    return _NOT_SET if best is None else f"{figure(key, best[1])} at step {best[0]:,.0f}"


def _most(run: Run, key: str) -> float | None:
    return max((value for _, value in run.curve(key)), default=None)


def _or_none(value: float | None, words: Any) -> str:
    return _NOT_SET if value is None else words(value)


def _columns(title: str, names: list[str], rows: dict[str, list[str]]) -> str:
    if not rows:
        return f"{title}: none\n"
    cells = [[title, *names], *([name, *values] for name, values in rows.items())]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines) + "\n"
