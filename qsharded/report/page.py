"""``report.html``: what was trained on what, how it went, and how to do it again, on one page to pass on."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from qsharded.report import figures
from qsharded.report.html import document, duration, facts, figure, section, table, tiles
from qsharded.report.run_files import Run
from qsharded.report.shareable import command, in_lines, name_of, settings

_MOST_SAMPLES = 24  # prompts


def page(run: Run) -> str:
    """The page of a run, at its end or on the way. No path of this machine, no name of it or of its user is in it."""
    head = f"<h1>Fine-tuning {escape(figures.model_name(run))}</h1>\n<p class=quiet>{escape(_status(run))}</p>\n"
    parts = [
        head,
        "".join(f'<p class="note">{escape(note)}</p>\n' for note in _notes(run)),
        tiles(figures.key_figures(run)),
        _plots(run),
        section("Evaluations", _evaluations(run)),
        section("Samples, before and after", _samples(run)),
        section("What was trained on what", _data(run.record)),
        section("Settings that are not the defaults", facts(settings(run.settings).items())),
        section("Environment", _environment(run)),
        section("To repeat it", _repeat(run)),
    ]
    return document(f"Fine-tuning {figures.model_name(run)}", "".join(parts))


def _status(run: Run) -> str:
    started = str(run.record.get("started", ""))[:16].replace("T", " ")
    state = "finished" if run.finished else "not finished"
    if run.stopped_early:
        state = "finished early, as later evaluations were no better"
    done = f"{state}: {figures.steps(run)} steps"
    spent = figures.seconds(run)
    return "; ".join(
        filter(
            None,
            [
                done,
                f"started {started}" if started else "",
                f"{duration(spent)} of training" if spent else "",
                figures.hardware(run),
            ],
        )
    )


def _notes(run: Run) -> Iterator[str]:
    if run.best_kept:
        best, value = run.best_kept, figure(run.best_kept["measure"], run.best_kept["value"])
        yield f"best/ has the adapter of step {best['step']:,}, whose {best['measure']} of {value} is the best"
    skipped = int(max((value for _, value in run.curve("skipped_steps")), default=0))
    if skipped:
        yield f"{skipped:,} steps were skipped, as their gradient was not finite"
    for change in run.record.get("changes", []):
        yield f"changed on the way: {change}"


def _plots(run: Run) -> str:
    small = "".join(plot.figure() for plot in figures.plots(run))
    return f'<div class="plots">{figures.loss_plot(run).figure(wide=True)}{small}</div>\n'


def _evaluations(run: Run) -> str:
    rows = figures.evaluations(run)
    return table(["step", *run.measured], rows) if rows else ""


def _samples(run: Run) -> str:
    prompts = list(dict.fromkeys(sample["prompt"] for sample in run.samples))
    if not prompts:
        return ""
    left = len(prompts) - _MOST_SAMPLES
    more = f"<p class=quiet>{left} more prompts are in samples.jsonl</p>\n" if left > 0 else ""
    shown = "".join(part for prompt in prompts[:_MOST_SAMPLES] for part in _sample(run, prompt))
    return f'<div class="samples">{shown}</div>\n{more}'


def _sample(run: Run, prompt: str) -> Iterator[str]:
    """The first answer to a prompt, and the last one."""
    answers = [sample for sample in run.samples if sample["prompt"] == prompt]
    first, last = answers[0], answers[-1]
    shown = [(f"step {one['step']:,}" if one["step"] else "before", one["answer"]) for one in (first, last)]
    yield f'<div class="sample"><div class="ask"><span>prompt</span>{_said(prompt)}</div>'
    yield from (f"<div><span>{when}</span>{_said(answer)}</div>" for when, answer in dict(shown).items())
    if last.get("reference") is not None:
        yield f"<div><span>reference</span>{_said(last['reference'])}</div>"
    yield "</div>\n"


def _said(words: str) -> str:
    return f"<div>{escape(words) or '<i>nothing</i>'}</div>"


def _data(record: Mapping[str, Any]) -> str:
    model = record.get("model", {})
    about = facts(
        [
            ("model", f"{name_of(str(model.get('name', '')))} {_at(model.get('commit'))}" if model else ""),
            ("architecture", model.get("type", "")),
            ("parameters", model.get("parameters", "")),
            ("trained in adapters", model.get("trained", "")),
            ("rows of a step", record.get("rows_per_step", "")),
            ("steps", record.get("steps", "")),
        ]
    )
    rows = [
        [escape(f"{name_of(one['name'])} {_at(', '.join(one.get('commits', [])))}"), one["use"],
         *(f"{one[key]:,}" for key in ("rows", "tokens", "trained_tokens"))]
        for one in record.get("data", [])
    ]  # fmt: skip
    return about + (table(["data", "for", "rows", "tokens", "trained tokens"], rows) if rows else "")


def _at(commit: str | None) -> str:
    return f"at {commit}" if commit else ""


def _environment(run: Run) -> str:
    record = run.record
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    plan = record.get("plan")
    return facts(
        [
            ("versions", versions),
            ("qsharded's commit", record.get("commit") or ""),
            ("hardware", figures.hardware(run)),
            ("ranks", record.get("ranks", "")),
            ("nodes", record.get("nodes", "")),
            ("planned GPU memory", _planned(plan) if plan else ""),
            *((f"fingerprint of the {name}", digest) for name, digest in record.get("fingerprints", {}).items()),
            ("starts", [_start(one) for one in figures.starts(run)] if record.get("earlier_starts") else ""),
        ]
    )  # fmt: skip


def _planned(plan: Mapping[str, float]) -> str:
    return f"{plan['reserved_gib']:.1f} GiB reserved, {plan['allocated_gib']:.1f} allocated"


def _start(one: Mapping[str, Any]) -> str:
    first = one.get("first_step", 0)
    where = f"from step {first:,}" if first else "at the beginning"
    return f"{str(one.get('started', ''))[:16].replace('T', ' ')} {where} on {one.get('ranks')} ranks"


def _repeat(run: Run) -> str:
    ranks, nodes = run.record.get("ranks", 1), run.record.get("nodes", 1)
    return (
        f"<pre>{escape(in_lines(command(run.settings, ranks, nodes)))}</pre>\n"
        "<p class=quiet>Files are named without their folders: give the paths that they have where you run it.</p>\n"
    )
