"""The lines that train the shapes of large models, with random weights: speed, memory, and the plan beside it."""

import json
import math
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_training import LARGEST_LOSS_GAP, LLAMA3, SHAPES, shape_options
from benchmarks.launch import flags_of, torchrun
from benchmarks.plan import LARGEST_GAP
from benchmarks.trainer_rank import memory, step_seconds
from benchmarks.two_gpus.line import Line
from benchmarks.two_gpus.runner import Found
from qsharded.cli.base_model import lora_config
from qsharded.config import TrainConfig, parse
from qsharded.models import ModelConfig
from qsharded.plan.run import plan
from qsharded.report.run_files import read_metrics
from qsharded.utils.hardware import GIB

OFFLOADED = {"activation_checkpointing": "offloaded", "lora_dtype": "bfloat16"}
TINY = LLAMA3 | {
    "vocab_size": 262,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}

TINY_LENGTH = 32


@dataclass(frozen=True)
class Large:
    """A run of a few steps.

    Attributes:
        shape: a model's config.json; a short run takes ``tiny``.
        rows: of a micro-batch of one rank.
        length: of a row, in tokens.
        accumulation: micro-batches of a rank in a step.
        least_speed: tokens a second and GPU.
        most_gib: that PyTorch may reserve on a GPU.
        like: the run whose losses it has, and ``of_its_speed`` of its tokens a second and GPU.
    """

    name: str
    shape: dict[str, Any]
    ranks: int
    rows: int
    length: int
    accumulation: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    least_speed: float = 0.0
    most_gib: float = math.inf
    like: str | None = None
    of_its_speed: float = 0.0
    limit_s: float = 120.0
    tiny: dict[str, Any] = field(default_factory=lambda: TINY)

    def run(self, short: bool, folder: Path) -> Found:
        """Train, in another shape where it is to be ``short``, and look at what came."""
        came = self._measured(folder, *((self.tiny, TINY_LENGTH) if short else (self.shape, self.length)))
        (folder / f"{self.name}.came.json").write_text(json.dumps(came))
        missed = ["finite losses"] * (None in came["losses"])  # as which the trainer logs what is not finite
        if torch.cuda.is_available():
            missed += self._missed_figures(came)
        if self.like:
            missed += self._compare(came, json.loads((folder / f"{self.like}.came.json").read_text()))
        return Found(came, missed)

    def _measured(self, folder: Path, shape: dict[str, Any], length: int) -> dict[str, Any]:
        own, rows = folder / self.name, self.ranks * self.rows * self.accumulation * self.steps
        settings = shape_options(shape, own, rows, length) | {
            "random_init": True,
            "output_dir": own / "output",
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.steps,
            "logging_steps": 1,
            "save_steps": 0,
        }
        flags = flags_of(settings | self.options)
        subprocess.run(torchrun(self.ranks, "benchmarks.trainer_rank", flags), check=True)
        logged = read_metrics(own / "output" / "metrics.jsonl")
        config = parse(flags, TrainConfig)
        planned = plan(ModelConfig.from_hf(shape), config, self.ranks, lora=lora_config(config, None)).allocated
        taken, tokens = memory(own / "output"), self.rows * self.accumulation * length
        return {
            "losses": [row["loss"] for row in logged],
            "tokens_per_second_a_gpu": tokens / median(step_seconds(own / "output")[1:]),
            "planned_gib": planned / GIB,
            **{f"{key}_gib": value / GIB for key, value in taken.items()},
            "plan_gap": planned / taken["allocated"] - 1 if taken else None,
        }

    def _missed_figures(self, came: dict[str, Any]) -> list[str]:
        held = {
            "plan": abs(came["plan_gap"]) <= LARGEST_GAP,
            "speed": came["tokens_per_second_a_gpu"] >= self.least_speed,
            "memory": came["reserved_gib"] <= self.most_gib,
        }
        return [name for name, holds in held.items() if not holds]

    def _compare(self, came: dict[str, Any], other: dict[str, Any]) -> list[str]:
        """Adds to ``came`` how it stands to the other run; what of that was missed."""
        gaps = [abs(one / two - 1) for one, two in zip(came["losses"], other["losses"], strict=True)]
        came["largest_loss_gap"] = max(gaps)
        came["of_its_speed"] = came["tokens_per_second_a_gpu"] / other["tokens_per_second_a_gpu"]
        missed = [] if came["largest_loss_gap"] <= LARGEST_LOSS_GAP else ["losses"]
        is_slow = torch.cuda.is_available() and came["of_its_speed"] < self.of_its_speed
        return missed + ["speed"] * is_slow


LARGE = (
    Large("8b-one-gpu", SHAPES["llama3-8b"], 1, 4, 2048, 2, 6),
    Large("8b-two-gpus", SHAPES["llama3-8b"], 2, 4, 2048, 1, 6, like="8b-one-gpu", of_its_speed=0.9),
    Large("70b-1x2048", SHAPES["llama3-70b"], 2, 1, 2048, 1, 5, OFFLOADED, most_gib=24.0),
    Large("70b-2x2048", SHAPES["llama3-70b"], 2, 2, 2048, 2, 4, least_speed=1100.0),
    Large("405b-1x1024", SHAPES["llama3-405b"], 2, 1, 1024, 1, 3, OFFLOADED, limit_s=200.0),
)


def line(case: Large, short: bool) -> Line:
    """It as a line of a record, with what is asked of it in words."""
    asked = [f"peak within {LARGEST_GAP:.0%} of the plan"]
    if case.like:
        asked.append(f"losses of {case.like} within {LARGEST_LOSS_GAP:g}, {case.of_its_speed:g} of its speed a GPU")
    asked += [f"{case.least_speed:g} tokens/s a GPU"] * (case.least_speed > 0)
    asked += [f"at most {case.most_gib:g} GiB a GPU"] * (case.most_gib < math.inf)
    return Line(case.name, ", ".join(asked), partial(case.run, short), case.limit_s, alone=True, after=case.like)
