"""One rank of ``benchmarks.gpu_training``: the trainer as it is, or, with more ranks than GPUs, over gloo."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsharded import assembly, train
from qsharded.config import TrainConfig, builtin_overrides, parse
from qsharded.parallel import World, stop_world


def main() -> None:
    if int(os.environ["WORLD_SIZE"]) <= torch.cuda.device_count():
        return train.main()
    config = parse(sys.argv[1:], TrainConfig, fill=builtin_overrides)
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # a device that is in use is not chosen anew by the mesh
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), device, init_device_mesh("cuda", (dist.get_world_size(),)))
    train.run(config, world, assembly.prepare(config, world))
    stop_world(world)
    return None


if __name__ == "__main__":
    main()
