"""The figures of a run that a report and a comparison both show."""

from itertools import groupby
from typing import Any

from qsharded.report.html import duration, figure, short
from qsharded.report.plot import Curve, Plot
from qsharded.report.run_files import Run
from qsharded.report.shareable import name_of

_MOST_EVALUATIONS = 12


def model_name(run: Run) -> str:
    """What was trained, as it may be shared."""
    return name_of(str(run.settings.get("model", "")))


def hardware(run: Run) -> str:
    """What it ran on."""
    gpus = run.record.get("gpus", [])
    if gpus:
        return ", ".join(f"{gpu['count']} x {gpu['name']} ({gpu['memory_gib']:.0f} GiB)" for gpu in gpus)
    cpu = run.record.get("cpu")
    return f"{cpu['name']}, {cpu['cores']} cores" if cpu else ""


def seconds(run: Run) -> float | None:
    """Of training and evaluating, over all starts of the run; loading does not count."""
    return next((row["seconds"] for row in reversed(run.rows) if "seconds" in row), None)


def speed(run: Run) -> float | None:
    """Tokens a second of all ranks: the median of the logged ones."""
    values = sorted(value for _, value in run.curve("tokens_per_second"))
    return values[len(values) // 2] if values else None


def key_figures(run: Run) -> list[tuple[str, str]]:
    """(what, how much) of the run as a whole."""
    found = [("steps", steps(run)), ("loss", figure("loss", run.last("loss")))]
    for key in run.measured:
        best = run.best(key)
        if best is not None and not key.endswith("perplexity"):
            found.append((f"best {key}, step {best[0]:,.0f}", figure(key, best[1])))
    if (rate := speed(run)) is not None:
        found.append(("tokens/s", short(rate)))
    if memory := [value for _, value in run.curve("memory_gib")]:
        found.append((memory_words(run), f"{max(memory):.1f} GiB"))
    if (spent := seconds(run)) is not None:
        found.append(("time", duration(spent)))
    return found


def evaluations(run: Run) -> list[list[str]]:
    """For each step that was measured at, the first and the latest ones, the step and the figures of ``measured``."""
    rows = [row for row in run.rows if "loss" not in row]
    steps = [
        (step, {k: v for row in group for k, v in row.items()})
        for step, group in groupby(rows, lambda row: row["step"])
    ]
    shown = steps if len(steps) <= _MOST_EVALUATIONS else [*steps[:1], *steps[1 - _MOST_EVALUATIONS :]]
    return [
        [f"{step:,}" if step else "0, before training", *(figure(key, row.get(key)) for key in run.measured)]
        for step, row in shown
    ]


def memory_words(run: Run) -> str:
    """What the memory of the rows is."""
    return "peak GPU memory" if run.record.get("gpus") else "peak host memory"


def steps(run: Run) -> str:
    """Done, and to do where that is another number."""
    total = run.total_steps
    return f"{run.step:,}" if total in (None, run.step) else f"{run.step:,} of {total:,}"


def loss_plot(run: Run) -> Plot:
    """Training and validation on one scale."""
    losses = [key for key in run.measured if key.endswith("loss")]
    curves = [Curve("training", run.curve("loss"), noisy=True)]
    curves += [Curve(_set_name(key), run.curve(key), dots=True) for key in losses]
    return Plot("Loss, nats a trained token", curves, magnitudes=True, marks=marks(run))


def _set_name(key: str) -> str:
    named = key.removeprefix("eval_").removesuffix("loss").strip("_")
    return f"evaluation {named}".strip()


def marks(run: Run) -> list[tuple[float, str]]:
    """Where the run was gone on with, and where its best step is."""
    resumed = [(one["first_step"], "resumed") for one in starts(run) if one.get("first_step")]
    return resumed + ([(run.best_kept["step"], "best")] if run.best_kept else [])


def starts(run: Run) -> list[dict[str, Any]]:
    """The record's account of each start, the first one first."""
    return [*run.record.get("earlier_starts", []), run.record] if run.record else []


def plots(run: Run) -> list[Plot]:
    """The others: gradient, rate, speed, memory; then what was measured beside losses."""
    plan = run.record.get("plan")
    memory = [Curve("peak", run.curve("memory_gib"))]
    if plan and run.step:
        limit = plan["reserved_gib"]
        memory.append(Curve(f"planned {limit:.1f}", [(0, limit), (run.step, limit)], dashed=True))
    found = [
        Plot("Gradient norm, before clipping", [_curve(run, "grad_norm", noisy=True)], from_zero=True),
        Plot("Learning rate", [_curve(run, "learning_rate")], from_zero=True),
        Plot("Tokens/s, all ranks", [_curve(run, "tokens_per_second", noisy=True)], from_zero=True),
        Plot(f"{memory_words(run)[0].upper()}{memory_words(run)[1:]}, GiB", memory, from_zero=True),
    ]
    curves = [_curve(run, key, dots=True) for key in run.measured if not key.endswith(("loss", "perplexity"))]
    # two values, before and after, are read from the table
    return found + [Plot(curve.name, [curve], from_zero=True) for curve in curves if len(curve.points) > 2]


def _curve(run: Run, key: str, **kind: bool) -> Curve:
    return Curve(key, run.curve(key), **kind)
