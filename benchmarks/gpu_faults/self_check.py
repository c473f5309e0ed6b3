"""The self-check at the start, on two layers of the width of Llama-3-405B: what it finds, how long it takes, and what
memory. On a machine without GPUs on the built-in model.

Its time is what a run with it takes longer until the first step is done: kernels and connections that the check loads
first, a step without it would load."""

import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_faults.ranks import BUILTIN, start, statuses
from benchmarks.gpu_training import SHAPES, shape_options
from benchmarks.launch import flags_of
from benchmarks.trainer_rank import memory
from benchmarks.two_gpus.runner import Found
from benchmarks.two_gpus.small import RANKS
from qsharded.cli.base_model import lora_config
from qsharded.config import TrainConfig, parse
from qsharded.models import ModelConfig
from qsharded.plan.run import plan
from qsharded.report.run_files import read_metrics
from qsharded.utils.hardware import GIB

SHAPE = SHAPES["llama3-405b"] | {"num_hidden_layers": 2}
LENGTH, STEPS = 1024, 2
LAYER_GIB = 1.7  # of that width, in 4 bits: what the check holds beside what training does
SECONDS = 1.0
LINE = re.compile(r"self-check: gather probe exact, layer 0 computes as .*; (?P<seconds>[\d.]+) s")


def self_check(folder: Path) -> Found:
    own = folder / "self-check"
    common: dict[str, Any] = {"max_steps": STEPS, "self_check": "always", "output_dir": own / "output"}
    if not torch.cuda.is_available():
        ranks = start(own, ["benchmarks.trainer_rank"], BUILTIN | common)
        return found_of(statuses(ranks), ranks[0].said(), {}, 0.0, 0.0)
    options = shape_options(SHAPE, folder / "wide", RANKS * STEPS, LENGTH) | common
    options |= {"random_init": True, "per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 0}
    without = folder / "no-self-check"  # first, so that what is compiled lies there for both
    statuses(start(without, ["qsharded.train"], options | {"self_check": "never", "output_dir": without / "output"}))
    ranks = start(own, ["benchmarks.trainer_rank"], options)
    found = statuses(ranks)
    saved = first_step_seconds(without / "output") - first_step_seconds(own / "output")
    config = parse(flags_of(options), TrainConfig)
    planned = plan(ModelConfig.from_hf(SHAPE), config, RANKS, lora=lora_config(config, None)).allocated / GIB
    return found_of(found, ranks[0].said(), memory(own / "output"), planned, saved)


def first_step_seconds(output: Path) -> float:
    first = read_metrics(output / "metrics.jsonl")[0]
    return float(RANKS * LENGTH / first["tokens_per_second"])


def found_of(
    found: list[int], said: list[str], taken: dict[str, int], planned_gib: float, saved_seconds: float
) -> Found:
    """``taken``: bytes of a GPU, nothing where there is none. ``saved_seconds``: by which the first step is shorter."""
    lines = [line for line in said if "self-check: " in line]
    match = LINE.match(lines[0]) if lines else None
    took = float(match["seconds"]) if match else None
    allocated = taken.get("allocated", 0) / GIB
    held = {
        "exit status": found == [0] * RANKS,
        "one line": len(lines) == 1 and match is not None,
        "a second at most": took is not None and took - saved_seconds <= SECONDS,
        "a layer's memory": not taken or allocated <= planned_gib + LAYER_GIB,
    }
    came = {"exit_statuses": found, "printed": lines, "first_step_shorter_by_s": round(saved_seconds, 2)}
    came |= {"allocated_gib": round(allocated, 2), "planned_gib": round(planned_gib, 2)}
    return Found(came, [name for name, holds in held.items() if not holds])
