"""Loading a checkpoint: how long against reading its bytes and quantizing them, and how much memory it takes.

    python -m benchmarks.loading --gib 30 --shape llama3-70b [--ranks 2] [--folder DIR] [--record FILE]

A folder of safetensors is written in the shape of a model, with as many layers as --gib holds, and removed at the end.
Each of the three is then measured in processes of its own, on bytes that were read once before (page cache warm):
reading this rank's rows, quantizing as many bytes that are on the device already, and loading. Fails where loading
takes more than 1.3 times the sum of the first two, where a rank needs more than 2 GiB of host memory, or where device
memory passes the shard and the largest tensor.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.record import command, environment, write
from qsharded.checkpoint.load import expected_shapes, parameter_count, skeleton
from qsharded.checkpoint.safetensors_writer import SafetensorsFile
from qsharded.checkpoint.source import INDEX
from qsharded.models import ModelConfig
from qsharded.models.choice import ModelCode

SIZES = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "llama3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "llama3-405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128},
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
VOCABULARY = 128256
BYTES_A_FILE = 4 << 30
MOST_TIME, MOST_HOST_GIB = 1.3, 2.0
PHASES = ("read", "quantize", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2, help="size of the checkpoint, at the most")
    parser.add_argument("--shape", choices=SIZES, default="llama3-8b")
    parser.add_argument("--model-code", choices=get_args(ModelCode), default="native")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--folder", type=Path, help="where to write it; the system's temporary folder by default")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each; the median counts")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write_checkpoint(Path(folder), arguments.shape, int(arguments.gib * 2**30))
        measured = [[run_phase(phase, Path(folder), arguments.ranks, arguments.model_code) for phase in PHASES]
                    for _ in range(arguments.repeats)]  # fmt: skip
    record = environment() | {
        "command": command("benchmarks.loading"),
        "shape": arguments.shape,
        "model_code": arguments.model_code,
        "gib": size / 2**30,
        "ranks": arguments.ranks,
        "limits": {"time": MOST_TIME, "host_gib": MOST_HOST_GIB},
    }
    record |= summary([dict(zip(PHASES, phases, strict=True)) for phases in measured])
    print(json.dumps(record, indent=2))
    if arguments.record:
        write(arguments.record, record)
    sys.exit(bool(record["missed"]))


def shape_for(shape: str, most_bytes: int) -> dict[str, Any]:
    """config.json of a model of this shape that fits: a cut vocabulary where the full one is a quarter, then layers."""
    hidden = SIZES[shape]["hidden_size"]
    vocabulary = min(VOCABULARY, most_bytes // 4 // (2 * 2 * hidden))

    def config(layers: int) -> dict[str, Any]:
        return COMMON | SIZES[shape] | {"num_hidden_layers": layers, "vocab_size": vocabulary}

    one, two = (2 * parameter_count(on_meta(config(layers))) for layers in (1, 2))
    layers = 1 + (most_bytes - one) // (two - one)
    if layers < 1:
        raise SystemExit(f"one layer of {shape} takes {one / 2**30:.2f} GiB: raise --gib")
    return config(layers)


def on_meta(config: dict[str, Any]) -> torch.nn.Module:
    return skeleton(ModelConfig.from_hf(config), None, torch.bfloat16)


def write_checkpoint(folder: Path, shape: str, most_bytes: int) -> int:
    """Write one, of normal numbers that repeat; its size in bytes."""
    config = shape_for(shape, most_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(on_meta(config))
    values = (torch.randn(8 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8)
    index: dict[str, str] = {}
    groups = list(files(shapes))
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        with SafetensorsFile(folder / file, {name: (torch.bfloat16, shapes[name]) for name in names}) as out:
            for name in names:
                size = 2 * math.prod(shapes[name])
                for first in range(0, size, values.numel()):
                    out.write(name, values[: size - first], first)
        index |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return 2 * sum(map(math.prod, shapes.values()))


def files(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The names, cut into files of about ``BYTES_A_FILE``."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * math.prod(shape)
        if size >= BYTES_A_FILE:
            yield names
            names, size = [], 0
    if names:
        yield names


def run_phase(phase: str, folder: Path, ranks: int, model_code: ModelCode) -> list[dict[str, Any]]:
    """What each rank measured."""
    with tempfile.TemporaryDirectory() as results:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run(
            [*launcher, "-m", "benchmarks.loading_rank", phase, str(folder), results, model_code], check=True
        )
        return [json.loads(Path(results, f"{rank}.json").read_text()) for rank in range(ranks)]


def summary(repeats: list[dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """The slowest and the largest rank of each measurement; times are medians, memory is the most."""

    def seconds(phase: str) -> float:
        slowest = sorted(max(rank["seconds"] for rank in repeat[phase]) for repeat in repeats)
        return slowest[len(slowest) // 2]

    def most(key: str) -> float:
        return max(rank[key] for repeat in repeats for rank in repeat["load"])

    times = {f"{phase}_s": seconds(phase) for phase in PHASES}
    ratio = times["load_s"] / (times["read_s"] + times["quantize_s"])
    memory = {key: most(key) for key in ("host_gib", "device_gib", "shard_gib", "largest_tensor_gib")}
    missed = {
        "time": ratio > MOST_TIME,
        "host memory": memory["host_gib"] > MOST_HOST_GIB,
        "device memory": memory["device_gib"] > memory["shard_gib"] + memory["largest_tensor_gib"],
    }
    return times | {"load_over_read_and_quantize": ratio} | memory | {"missed": [k for k, v in missed.items() if v]}


if __name__ == "__main__":
    main()
