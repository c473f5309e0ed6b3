"""Fine-tuning on each kind of base by the trainer's command, on texts that calibration never saw: loss on other parts.

The learning rate is swept for each base with one seed; further seeds train at its best one.
"""

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibration import texts
from benchmarks.calibration.quality import CHUNK, quantized
from qsharded import train
from qsharded.config.evaluated import measure as measure_name
from qsharded.report.run_files import Run

RESIDUAL = " + residual adapter"
NEAREST = "nearest"
BASES = ["compensated", NEAREST + RESIDUAL, "compensated" + RESIDUAL]  # to compare with it
LENGTH, HELD_OUT_ROWS = 128, 32  # tokens in a row; rows of each text
_CHARACTERS = 6 * LENGTH  # in a row before it is cut: enough for so many tokens of any of these texts
_SAVE_STEPS = 50


@dataclass(frozen=True)
class Tuned:
    """A run and its losses, in nats a token: on each text, as the base came and after training."""

    base: str
    rate: float
    seed: int
    before: dict[str, float]
    after: dict[str, float]

    @property
    def loss(self) -> float:
        """After training. Texts have as many tokens each."""
        return statistics.fmean(self.after.values())


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bool]]:
    """The figures, and whether each base's loss lies below that of nearest by more than the seeds' spread."""
    for name in ("calibrated", "tuned", "bases", "runs"):
        (arguments.folder / name).mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    sweep = [bench.tuned(base, rate, 1) for base in (NEAREST, *arguments.bases) for rate in arguments.rates]
    rates = best_rates(sweep)
    others = range(2, arguments.seeds + 1)
    runs = sweep + [bench.tuned(base, rate, seed) for seed in others for base, rate in rates.items()]
    table = {base: figures(run for run in runs if (run.base, run.rate) == (base, rates[base])) for base in rates}
    record = {
        "calibrated_on": arguments.calibration_text,
        "rows": arguments.rows,
        "length": arguments.length or CHUNK,
        "tuned_on": arguments.text,
        "origins": texts.origins(),
        "steps": arguments.steps,
        "rows_in_a_step": arguments.batch,
        "tokens_in_a_row": LENGTH,
        "held_out_rows_of_a_text": HELD_OUT_ROWS,
        "table": table,
        "runs": [asdict(run) | {"loss": run.loss} for run in runs],
    }
    return record, verdicts(table)


class Bench:
    """Makes bases, and trains on them, in a folder that keeps what is there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, arguments.folder
        self.calibrated = [
            texts.write_rows(texts.text_of(source), self.folder / "calibrated" / f"{number}.jsonl")
            for number, source in enumerate(arguments.calibration_text)
        ]
        self.train: list[Path] = []
        self.held_out: list[Path] = []
        for number, source in enumerate(arguments.text):
            text, path = texts.text_of(source), self.folder / "tuned"
            self.train.append(texts.write_rows(text, path / f"train{number}.jsonl", _CHARACTERS))
            rows = texts.write_measured_rows(text, path / f"text{number}.jsonl", _CHARACTERS, HELD_OUT_ROWS)
            self.held_out.append(rows)

    def base(self, method: str) -> Path:
        """Its folder."""
        folder: Path = self.folder / "bases" / method
        if not folder.exists():
            quantized(self.arguments, self.arguments.length or CHUNK, self.calibrated, method, folder)
        return folder

    def tuned(self, base: str, rate: float, seed: int) -> Tuned:
        """The run, which is trained to its end if it is not yet."""
        output = self.folder / "runs" / f"{base}, {rate:g}, seed {seed}"
        train.main([*self._flags(base), *self._options(rate, seed), "--output-dir", str(output)])
        run = Run.read(output)
        before, after = (self._losses(run, step) for step in (0, self.arguments.steps))
        tuned = Tuned(base, rate, seed, before, after)
        print(tuned, flush=True)
        return tuned

    def _flags(self, base: str) -> list[str]:
        method = base.removesuffix(RESIDUAL)
        flags = ["--model", str(self.base(method)), "--dataset", *map(str, self.train)]
        flags += ["--dataset-weights", *["1"] * len(self.train)]
        flags += ["--eval-dataset", *(f"{path.stem}={path}" for path in self.held_out)]
        residual = ["--lora-init", "residual", "--original-model", str(self.arguments.model)]
        return flags + residual * (base != method)

    def _options(self, rate: float, seed: int) -> list[str]:
        """Otherwise the trainer's defaults. GPUs train in bfloat16; moments in 8 bits would save nothing here."""
        values = {
            "max-steps": self.arguments.steps,
            "learning-rate": rate,
            "seed": seed,
            "max-length": LENGTH,
            "overlong": "truncate",
            "per-device-train-batch-size": self.arguments.batch,
            "gradient-accumulation-steps": 1,
            "activation-checkpointing": "none",
            "dtype": "bfloat16",
            "optim": "adamw",
            "show-rows": 0,
            "save-steps": _SAVE_STEPS,
            "save-total-limit": 1,
            "resume-from-checkpoint": "auto",
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def _losses(self, run: Run, step: int) -> dict[str, float]:
        """On each text at a step."""
        losses = {}
        for source, path in zip(self.arguments.text, self.held_out, strict=True):
            found = dict(run.curve(measure_name(path.stem, "loss")))
            if step not in found:
                raise ValueError(f"the run {run.name!r} has no evaluation at step {step}: remove its folder")
            losses[source] = found[step]
        return losses


def best_rates(sweep: Iterable[Tuned]) -> dict[str, float]:
    """Of each base."""
    best: dict[str, Tuned] = {}
    for run in sweep:
        best[run.base] = min(run, best.get(run.base, run), key=lambda one: one.loss)
    return {base: run.rate for base, run in best.items()}


def figures(runs: Iterable[Tuned]) -> dict[str, Any]:
    """Of a base, of its runs at the best rate: losses over the seeds, and how far these lie apart."""
    runs = list(runs)
    losses = [run.loss for run in runs]
    by_text = {text: statistics.fmean(run.after[text] for run in runs) for text in runs[0].after}
    return {
        "rate": runs[0].rate,
        "before": statistics.fmean(runs[0].before.values()),
        "losses": losses,
        "loss": statistics.fmean(losses),
        "spread": max(losses) - min(losses),
        "by_text": by_text,
    }


def verdicts(table: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each base is better than nearest by more than the larger of both spreads."""
    nearest = table[NEAREST]
    checks = {}
    for base, of in table.items():
        if base != NEAREST:
            below, spread = nearest["loss"] - of["loss"], max(nearest["spread"], of["spread"])
            checks[f"{base}: loss {below:.4f} below nearest's, > {spread:.4f}, the seeds' spread"] = below > spread
    return checks
