"""Training on one GPU and on several gives the same losses: the built-in run, and an 8B shape with random weights.

    python -m benchmarks.gpu_training [--gpus 1 2] [--share-gpu] [--record FILE]

Each number of GPUs trains on the same rows in the same steps; the record holds the loss of every step, speed and peak
memory. ``--share-gpu`` runs two ranks on one GPU over gloo, for machines that have one: sharding, copies and kernels
are the same, only the wire differs (and its speed means nothing).
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

from benchmarks.record import environment
from qsharded import train
from qsharded.metrics import read_metrics

BUILTIN = Path(train.__file__).parent / "builtin"
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LARGEST_LOSS_GAP = 2e-3  # relative, step by step: bf16 arithmetic in another order, carried on by training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, max(1, torch.cuda.device_count())])
    parser.add_argument("--share-gpu", action="store_true", help="two ranks on the first GPU as well, over gloo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/gpu_training.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            "builtin": compare(arguments, Path(scratch, "builtin"), builtin_options(arguments.steps)),
            "llama3-8b": compare(arguments, Path(scratch, "8b"), shape_options(Path(scratch), arguments.steps)),
        }
    command = "python -m " + " ".join(["benchmarks.gpu_training", *sys.argv[1:]])
    record = environment() | {"command": command, "largest_gap_allowed": LARGEST_LOSS_GAP, "runs": runs}
    arguments.record.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    sys.exit(any(run["largest_gap"] > LARGEST_LOSS_GAP for run in runs.values()))


def builtin_options(steps: int) -> dict[str, Any]:
    return {"max_steps": steps}


def shape_options(folder: Path, steps: int) -> dict[str, Any]:
    """An 8B shape with the built-in model's tokenizer, on rows of random text of about 2,048 tokens."""
    model = folder / "llama3-8b"
    model.mkdir()
    for file in BUILTIN.joinpath("model").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text(json.dumps(LLAMA3_8B))
    random = Random(0)
    rows = [{"text": "".join(random.choices("abcdefghij", k=2040))} for _ in range(8 * steps)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": model, "dataset": folder / "rows.jsonl", "max_steps": steps, "max_length": 2048}


def compare(arguments: argparse.Namespace, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One training for each number of GPUs, eight rows a step in all, and how far their losses lie apart."""
    folder.mkdir(parents=True)
    runs = [measure(folder / f"gpus{gpus}", gpus, gpus, options) for gpus in dict.fromkeys(arguments.gpus)]
    if arguments.share_gpu:
        runs.append(measure(folder / "shared", 2, 1, options))
    first = runs[0]["losses"]
    gaps = [abs(a - b) / a for run in runs for a, b in zip(first, run["losses"], strict=True)]
    return {"largest_gap": max(gaps), "runs": runs}


def measure(folder: Path, ranks: int, gpus: int, options: dict[str, Any]) -> dict[str, Any]:
    settings = options | {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2 // ranks,
        "logging_steps": 1,
        "save_steps": 0,
        "lora_r": 16,
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    flags += ["--random-init"] if "model" in options else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([*launcher, "-m", "benchmarks.gpu_training_rank", *flags], check=True)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return {
        "ranks": ranks,
        "gpus": gpus,
        "losses": [row["loss"] for row in rows],
        "tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2],
        "peak_memory_gib": max(row["memory_gib"] for row in rows),
    }


if __name__ == "__main__":
    main()
