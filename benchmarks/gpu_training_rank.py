"""One rank of ``benchmarks.gpu_training``: the trainer as it is, or, with more ranks than GPUs, over gloo."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsharded import train
from qsharded.checkpoint.background_writer import CheckpointWriter
from qsharded.config import TrainConfig, builtin_overrides, parse
from qsharded.distributed.fsdp import World, let_reserved_memory_grow, stop_world
from qsharded.training import setup
from qsharded.training.determinism import use_deterministic_algorithms
from qsharded.training.metrics import MetricsLog


def main() -> None:
    if int(os.environ["WORLD_SIZE"]) <= torch.cuda.device_count():
        return train.main()
    config = parse(sys.argv[1:], TrainConfig, fill=builtin_overrides)
    if config.deterministic:
        use_deterministic_algorithms()
    let_reserved_memory_grow()
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # a device that is in use is not chosen anew by the mesh
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), device, init_device_mesh("cuda", (dist.get_world_size(),)))
    parts = setup.prepare(config, world)
    output = Path(config.output_dir)
    with (
        MetricsLog(output / "metrics.jsonl", parts.total_steps, world.is_main, first_step=parts.progress.step) as log,
        CheckpointWriter(output, world, config.save_total_limit) as writer,
    ):
        # and no more: gloo crashes on some collectives of GPU tensors
        train.train_steps(config, world, parts, log, writer)
    stop_world(world)
    return None


if __name__ == "__main__":
    main()
