"""One rank of ``benchmarks.gpu_training``: the trainer as it is, or, with more ranks than GPUs, over gloo."""

import os
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsharded import train
from qsharded.cli import command_line
from qsharded.config import TrainConfig, builtin_overrides, parse
from qsharded.distributed.world import World, let_reserved_memory_grow, stop_world
from qsharded.training import setup
from qsharded.training.determinism import use_deterministic_algorithms
from qsharded.training.trainer import Trainer


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
    prepared = setup.prepare(config, world)
    again = partial(command_line.command, sys.argv[1:], world.size)
    with Trainer.opened(config, world, prepared, again) as trainer:
        # and no more: gloo crashes on some collectives of GPU tensors
        trainer.train()
    stop_world(world)
    return None


if __name__ == "__main__":
    main()
