"""Is the peak of GPU memory what ``--dry-run`` says? A few steps of several shapes, planned and measured.

    python -m benchmarks.plan [--case NAME ...] [--record FILE]

Weights are random, rows are full. The record holds each case's plan by class, what PyTorch allocated and reserved at
most in the whole run, and how far the plan lies from it; the exit status is 1 where that is more than 10%.
``benchmarks.two_gpus`` does the same for models that are cut over two GPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.gpu_training import SHAPES, write_model
from benchmarks.launch import flags_of, torchrun
from benchmarks.record import command, environment, write
from benchmarks.trainer_rank import memory
from qsharded.cli.base_model import lora_config
from qsharded.config import TrainConfig, parse
from qsharded.models import ModelConfig
from qsharded.plan.run import plan

LARGEST_GAP = 0.10
LLAMA3_8B, LLAMA3_70B = SHAPES["llama3-8b"], SHAPES["llama3-70b"]
TINY = LLAMA3_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 4}
CHECKPOINTING = "--activation-checkpointing"
FULL = [CHECKPOINTING, "full"]
# name: (shape, GPUs, rows of a micro-batch, tokens of a row, further flags)
CASES: dict[str, tuple[dict[str, Any], int, int, int, list[str]]] = {
    "1b-keeping": (TINY, 1, 4, 2048, [CHECKPOINTING, "none"]),
    "8b": (LLAMA3_8B, 1, 4, 2048, FULL),
    "8b-long": (LLAMA3_8B, 1, 1, 16384, FULL),
    "8b-keeping": (LLAMA3_8B, 1, 1, 2048, [CHECKPOINTING, "none"]),
    "8b-bf16-adapters": (LLAMA3_8B, 1, 2, 2048, [*FULL, "--lora-dtype", "bfloat16", "--lora-r", "64"]),
    "8b-selective": (LLAMA3_8B, 1, 4, 2048, [CHECKPOINTING, "selective"]),
    "8b-offloaded": (LLAMA3_8B, 1, 4, 2048, [CHECKPOINTING, "offloaded"]),
    "8b-mixed": (LLAMA3_8B, 1, 4, 2048, [*FULL, "--checkpointed-layers", "20"]),
    "8b-adamw": (LLAMA3_8B, 1, 1, 2048, [*FULL, "--optim", "adamw", "--lora-r", "128"]),
    "gemma3-27b": (SHAPES["gemma3-27b"], 1, 4, 2048, FULL),
    "phi4": (SHAPES["phi4"], 1, 4, 2048, FULL),
    "70b-from-host": (LLAMA3_70B, 1, 1, 2048, ["--cpu-offload", CHECKPOINTING, "offloaded"]),
    "8b-replicated": (LLAMA3_8B, 2, 4, 2048, [*FULL, "--sharding", "replicate"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, help="by default all that this machine's GPUs suffice for")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/plan.json"))
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    chosen = arguments.case or [name for name, case in CASES.items() if case[1] <= gpus]
    results = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = compare(Path(scratch), *CASES[name])
        print(name, json.dumps(results[name]), flush=True)
    record = environment() | {
        "command": command("benchmarks.plan"),
        "largest_gap_allowed": LARGEST_GAP,
        "cases": results,
    }
    write(arguments.record, record)
    sys.exit(any(abs(result["gap"]) > LARGEST_GAP for result in results.values()))


def compare(
    folder: Path, shape: dict[str, Any], ranks: int, rows: int, length: int, further: list[str]
) -> dict[str, Any]:
    """Plan a run, train it for three steps, and hold one against the other."""
    flags = options(folder, shape, rows, length) + further
    config = parse(flags, TrainConfig)
    planned = plan(ModelConfig.from_hf(shape), config, ranks, lora=lora_config(config, None))
    subprocess.run(torchrun(ranks, "benchmarks.trainer_rank", flags), check=True)
    measured = memory(folder / "output")
    classes = [{"class": row.name, "gib": row.bytes / 2**30, "phases": row.phases} for row in planned.rows]
    return {
        "gpus": ranks,
        "rows": rows,
        "length": length,
        "flags": further,
        "planned_gib": planned.allocated / 2**30,
        "planned_with_reserve_gib": planned.needed / 2**30,
        "allocated_gib": measured["allocated"] / 2**30,
        "reserved_gib": measured["reserved"] / 2**30,
        "used_of_the_gpu_gib": measured["used"] / 2**30,
        "gap": planned.allocated / measured["allocated"] - 1,
        "peak_phase": planned.peak_phase,
        "classes": classes,
    }


def options(folder: Path, shape: dict[str, Any], rows: int, length: int) -> list[str]:
    """Flags of a run on full rows of random text, with a model of that shape and the built-in tokenizer."""
    model = folder / "model"
    write_model(model, shape | {"max_position_embeddings": length})
    random = Random(0)
    text = [{"text": "".join(random.choices("abcdefghij", k=length + 10))} for _ in range(16 * rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    settings = {
        "model": model,
        "dataset": folder / "rows.jsonl",
        "output-dir": folder / "output",
        "max-length": length,
        "overlong": "truncate",
        "per-device-train-batch-size": rows,
        "gradient-accumulation-steps": 2,
        "max-steps": 3,
        "save-steps": 0,
        "logging-steps": 1,
    }
    return flags_of(settings | {"random-init": True})


if __name__ == "__main__":
    main()
