"""Training on one GPU and on several gives the same losses: the built-in run, and large shapes with random weights.

    python -m benchmarks.gpu_training [--runs builtin llama3-8b] [--gpus 1 2] [--share-gpu] [--record FILE]
    python -m benchmarks.gpu_training --runs llama3-70b --gpus 1 --rows 1 --rows-per-step 1 --cpu-offload ...

Each number of GPUs trains on the same rows in the same steps; the record holds the loss of every step, speed and peak
memory. Options that are not of this script go to the trainer. Two GPUs: ``benchmarks.two_gpus``.
``--share-gpu`` runs two ranks on one GPU over gloo, for machines that have one: sharding, copies and kernels are the
same, only the wire differs (and its speed means nothing).
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

from benchmarks.launch import flags_of, torchrun
from benchmarks.record import command, environment, write
from qsharded import train
from qsharded.report.run_files import read_metrics

BUILTIN = Path(train.__file__).parent / "builtin"
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GEMMA3_27B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
PHI4 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "tie_word_embeddings": False,
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "llama3-8b": LLAMA3 | dict(zip(_SIZES, (4096, 14336, 32, 32), strict=True)),
    "llama3-70b": LLAMA3 | dict(zip(_SIZES, (8192, 28672, 80, 64), strict=True)),
    "gemma3-27b": GEMMA3_27B,
    "phi4": PHI4,
    "llama3-405b": LLAMA3 | dict(zip(_SIZES, (16384, 53248, 126, 128), strict=True)),
}
LARGEST_LOSS_GAP = 2e-3  # relative, step by step: bf16 arithmetic in another order, carried on by training


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", choices=["builtin", *SHAPES], default=["builtin", "llama3-8b"])
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, max(1, torch.cuda.device_count())])
    parser.add_argument("--share-gpu", action="store_true", help="two ranks on the first GPU as well, over gloo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch on one GPU")
    parser.add_argument("--rows-per-step", type=int, default=8, help="of all GPUs and micro-batches together")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/gpu_training.json"))
    arguments, trainer_flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            name: compare(arguments, Path(scratch, name), run_options(name, Path(scratch), arguments), trainer_flags)
            for name in arguments.runs
        }
    record = environment() | {
        "command": command("benchmarks.gpu_training"),
        "largest_gap_allowed": LARGEST_LOSS_GAP,
        "runs": runs,
    }
    write(arguments.record, record)
    print(json.dumps(record, indent=2))
    sys.exit(any(run["largest_gap"] > LARGEST_LOSS_GAP for run in runs.values()))


def run_options(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The built-in run, or a shape on rows of random text."""
    if name == "builtin":
        return {"max_steps": arguments.steps}
    rows = arguments.rows_per_step * arguments.steps
    return shape_options(SHAPES[name], folder / f"{name}-data", rows, arguments.length) | {"max_steps": arguments.steps}


def shape_options(shape: dict[str, Any], folder: Path, rows: int, length: int) -> dict[str, Any]:
    """A new folder with a model of that shape, the built-in tokenizer, and so many rows of about ``length`` tokens."""
    model, dataset = folder / "model", folder / "rows.jsonl"
    folder.mkdir(parents=True)
    write_model(model, shape)
    random = Random(0)
    text = [{"text": "".join(random.choices("abcdefghij", k=length - 8))} for _ in range(rows)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in text))
    return {"model": model, "dataset": dataset, "max_length": length, "activation_checkpointing": "full"}


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A model of that shape without weights, with the built-in tokenizer."""
    folder.mkdir()
    for file in BUILTIN.joinpath("model").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(shape))


def compare(
    arguments: argparse.Namespace, folder: Path, options: dict[str, Any], trainer_flags: list[str]
) -> dict[str, Any]:
    """One training for each number of GPUs, the same rows a step in all, and how far their losses lie apart."""
    folder.mkdir(parents=True)
    ranks_and_gpus = [(gpus, gpus) for gpus in dict.fromkeys(arguments.gpus)] + [(2, 1)] * arguments.share_gpu
    runs = []
    for ranks, gpus in ranks_and_gpus:
        settings = options | {
            "output_dir": folder / f"ranks{ranks}-gpus{gpus}",
            "per_device_train_batch_size": arguments.rows,
            "gradient_accumulation_steps": arguments.rows_per_step // (arguments.rows * ranks),
        }
        runs.append({"ranks": ranks, "gpus": gpus} | measure(ranks, settings, trainer_flags))
    first = runs[0]["losses"]
    gaps = [abs(a - b) / a for run in runs for a, b in zip(first, run["losses"], strict=True)]
    return {"largest_gap": max(gaps), "runs": runs}


def measure(ranks: int, options: dict[str, Any], trainer_flags: list[str]) -> dict[str, Any]:
    settings = options | {"logging_steps": 1, "save_steps": 0, "lora_r": 16}
    settings |= {"random_init": True} if "model" in options else {}
    if "--activation-checkpointing" in trainer_flags:
        settings.pop("activation_checkpointing", None)
    subprocess.run(torchrun(ranks, "benchmarks.gpu_training_rank", [*flags_of(settings), *trainer_flags]), check=True)
    rows = [row for row in read_metrics(options["output_dir"] / "metrics.jsonl") if "loss" in row]
    assert not rows[-1]["skipped_steps"], "a step was skipped: its loss, and so the run, is no measure"
    return {
        "losses": [row["loss"] for row in rows],
        "tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2],
        "peak_memory_gib": max(row["memory_gib"] for row in rows),
    }


if __name__ == "__main__":
    main()
