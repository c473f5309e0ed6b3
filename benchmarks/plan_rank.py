"""One rank of ``benchmarks.plan``: a few steps of training, and the most memory that they took on any rank."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qsharded import assembly, train
from qsharded.checkpoint.writer import CheckpointWriter
from qsharded.commands import join_world
from qsharded.config import TrainConfig, parse
from qsharded.metrics import MetricsLog
from qsharded.parallel import World, stop_world


def main() -> None:
    config = parse(sys.argv[1:], TrainConfig)
    world = join_world("benchmarks.plan")
    parts = assembly.prepare(config, world)
    torch.cuda.empty_cache()  # what loading reserved is not the step's
    torch.cuda.reset_peak_memory_stats()
    output = Path(config.output_dir)
    with (
        MetricsLog(output / "metrics.jsonl", parts.total_steps, world.is_main) as log,
        CheckpointWriter(output, world, config.save_total_limit) as writer,
    ):
        train.train_steps(config, world, parts, log, writer)
    free, total = torch.cuda.mem_get_info()
    found = {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "used": total - free,
    }
    most = {name: largest(value, world) for name, value in found.items()}
    if world.is_main:
        (output / "memory.json").write_text(json.dumps(most))
    stop_world(world)


def largest(value: int, world: World) -> int:
    """The largest of the ranks' values."""
    shared = torch.tensor(value, device=world.device)
    if world.mesh is not None:
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


if __name__ == "__main__":
    main()
