"""The command that goes on with a run, for messages that a user copies."""

import os
import shlex
from pathlib import Path

from qsharded.config import TrainConfig
from qsharded.parallel import World


def command(config: TrainConfig, world: World, **options: str) -> str:
    """This run's command with some options changed (field name to value); config.toml in its output has the others."""
    words = ["--config", str(Path(config.output_dir, "config.toml"))]
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return f"{_launcher(world)} -m {config.prog} {shlex.join(words)}"


def _launcher(world: World) -> str:
    if world.size == 1:
        return "python"
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if on_this_node == world.size:
        return f"torchrun --standalone --nproc-per-node {world.size}"
    return f"torchrun --nnodes {world.size // on_this_node} --nproc-per-node {on_this_node} ..."
