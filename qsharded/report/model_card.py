"""``README.md`` of an adapter's folder: its model card, as the Hub shows it. No path of this machine is in it."""

from collections.abc import Iterator, Mapping
from typing import Any

from qsharded.report import figures
from qsharded.report.curves import smoothed
from qsharded.report.html import figure
from qsharded.report.markdown import code, front_matter, plain, section, sparkline, table
from qsharded.report.run_files import Point, Run
from qsharded.report.shareable import command, hub_id, in_lines, linked, name_of, settings

_PLACE = "path/to/adapter"  # in commands, of an adapter that is not on the Hub
_LOSS_ROWS, _SPARKS = 10, 48


def adapter_card(run: Run, adapter: Mapping[str, Any], step: int, place: str = _PLACE) -> str:
    """The card of an adapter that ``run`` has trained for ``step`` steps.

    Args:
        adapter: its adapter_config.json.
        place: what commands call the adapter, its name on the Hub.
    """
    base = str(run.record.get("model", {}).get("name") or run.settings.get("model", ""))
    parts = [
        front_matter(_metadata(run, base)),
        f"\n# LoRA adapter for {plain(name_of(base))}\n\n{_about(run, base, adapter, step)}\n",
        section("How to load it", _how_to_load(base, adapter, place)),
        section("Data", _data(run)),
        section("Settings", _settings(run, adapter)),
        section("Loss", _losses(run)),
        section("Environment", _environment(run)),
        section("To repeat it", _repeat(run)),
    ]
    return "".join(parts)


def _metadata(run: Run, base: str) -> dict[str, Any]:
    """What the Hub reads: it takes ids of its own alone for base and datasets, and refuses a card with others."""
    trained_on = [hub_id(one["name"]) for one in run.record.get("data", []) if one["use"] == "training"]
    return {
        "base_model": hub_id(base),
        "base_model_relation": "adapter" if hub_id(base) else None,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": sorted({name for name in trained_on if name}),
        "tags": ["lora", "qlora", "qsharded"],
    }


def _about(run: Run, base: str, adapter: Mapping[str, Any], step: int) -> str:
    model = run.record.get("model", {})
    trained, commit = model.get("trained"), f" (commit {model['commit']})" if model.get("commit") else ""
    parameters = f", {trained:,} parameters" if trained else ""
    of_all = "" if run.total_steps in (None, step) else f" of {run.total_steps:,}"
    return (
        f"It was trained for {step:,}{of_all} steps beside {linked(base)}{commit}, whose weights stayed in 4 bits, "
        f"with qsharded: rank {adapter['r']}, alpha {adapter['lora_alpha']:g}{parameters}."
    )


def _how_to_load(base: str, adapter: Mapping[str, Any], place: str) -> str:
    """Commands for PEFT, qsharded and vLLM."""
    base = hub_id(base) or "path/to/base"
    peft = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{_revision(adapter)}, dtype="auto", device_map="auto")\n'
        f'model = PeftModel.from_pretrained(base, "{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    )
    ours = (
        f"qsharded chat --model {base} --adapter {place}\n"
        f"qsharded merge --model {base} --adapter {place} --output merged\n"
    )
    return f"PEFT:\n\n{code(peft, 'python')}\nqsharded:\n\n{code(ours, 'bash')}\n{_vllm(base, adapter, place)}"


def _revision(adapter: Mapping[str, Any]) -> str:
    return f', revision="{adapter["revision"]}"' if adapter.get("revision") else ""


def _vllm(base: str, adapter: Mapping[str, Any], place: str) -> str:
    from qsharded.integrations.vllm import unsupported  # here, as all integrations are

    rank = int(adapter["r"])
    if reasons := list(unsupported(adapter, rank)):
        return f"vLLM serves it once it is merged, as above, not as an adapter: {plain('; '.join(reasons))}.\n"
    room = max(8, 1 << (rank - 1).bit_length())  # vLLM takes powers of two
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules tuned={place}\n"
    return f"vLLM, under the name `tuned`:\n\n{code(serve, 'bash')}"


def _data(run: Run) -> str:
    """Which rows, how many, and the fingerprint that another run on the same ones has too."""
    rows = [
        [name_of(one["name"]), ", ".join(one.get("commits", [])), one["use"], *_counts(one)]
        for one in run.record.get("data", [])
    ]
    prints = [[f"fingerprint of the {what}", digest] for what, digest in run.record.get("fingerprints", {}).items()]
    known = table(["data", "commit", "for", "rows", "tokens", "trained tokens"], rows)
    return known + table(["made from", "SHA-256, first 16 digits"], prints)


def _counts(one: Mapping[str, Any]) -> Iterator[int]:
    return (one[key] for key in ("rows", "tokens", "trained_tokens"))


def _settings(run: Run, adapter: Mapping[str, Any]) -> str:
    """The adapter's, the ones that everyone asks for, and what is not the default."""
    targets = adapter["target_modules"]
    shown = {
        "rank": adapter["r"],
        "alpha": f"{adapter['lora_alpha']:g}",
        "layers": targets if isinstance(targets, str) else ", ".join(targets or []),
        "rows of a step": run.record.get("rows_per_step"),
    }
    asked = ("learning-rate", "lr-scheduler-type", "optim", "max-length", "num-train-epochs")
    shown |= {key: run.settings.get(key) for key in asked}
    shown |= {key: value for key, value in settings(run.settings).items() if value is not None}
    return table(["setting", "value"], ([key, value] for key, value in shown.items() if value is not None))


def _losses(run: Run) -> str:
    """The curve, rows of it, and what evaluations measured."""
    points = run.curve("loss")
    if not points:
        return ""
    values = [value for _, value in _spread(smoothed(points) or points, _SPARKS)]
    curve = f"`{sparkline(values)}`\n\n" if len(values) > 2 else ""  # two are read from the table
    rows = [[int(at), figure("loss", value)] for at, value in _spread(points, _LOSS_ROWS)]
    measured = table(["step", *run.measured], figures.evaluations(run)) if run.measured else ""
    return f"{curve}{table(['step', 'training loss, nats a trained token'], rows)}{measured}"


def _spread(points: list[Point], most: int) -> list[Point]:
    """At most so many of them, evenly apart, the last one among them."""
    if len(points) <= most:
        return points
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def _environment(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.record.get("versions", {}).items())
    facts = [["versions", versions], ["hardware", figures.hardware(run)], ["ranks", run.record.get("ranks", "")]]
    return table(["what", "which"], (fact for fact in facts if fact[1]))


def _repeat(run: Run) -> str:
    words = in_lines(command(run.settings, run.record.get("ranks", 1), run.record.get("nodes", 1)))
    return f"{code(words, 'bash')}\nFiles are named without their folders."
