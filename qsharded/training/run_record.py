"""``run.json``: what a run was made from and by whom, written when it takes its output folder.

It pins what came from the Hub: a branch or tag can move, a commit cannot.
"""

import os
import platform
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qsharded import __version__
from qsharded.checkpoint.files import write_json
from qsharded.config import TrainConfig
from qsharded.data.sources import find_files
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.utils import collectives
from qsharded.utils.process_identity import ProcessIdentity

RECORD_FILE = "run.json"


def write_record(config: TrainConfig, world: World, model: Path) -> None:
    """Write the record into the output folder. Every rank calls this; ``model`` is the folder of the base model.

    Raises:
        ValueError: the disk did not let it; on every rank.
    """
    starters = collectives.all_gather_objects(starter().to_json(), world.long_timeout_group)
    found_by_main(world, partial(_write, config, world.size, model, starters))


def starter() -> ProcessIdentity:
    """The process that started this rank: torchrun's agent, which starts it anew after a failure, or a shell."""
    return ProcessIdentity.of(os.getppid())


def _write(config: TrainConfig, ranks: int, model: Path, starters: list[dict[str, Any]]) -> None:
    record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"qsharded": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "ranks": ranks,
        "main": ProcessIdentity.of(os.getpid()).to_json(),
        "started_by": [one for number, one in enumerate(starters) if one not in starters[:number]],
        "model": {"name": config.model, "commit": hub_commit(model)},
        "datasets": {name: _commits(name, config.dataset_split) for name in config.datasets},
    }
    write_json(Path(config.output_dir, RECORD_FILE), record)


def _commits(dataset: str, split: str) -> list[str]:
    return sorted({commit for path in find_files(dataset, split) if (commit := hub_commit(path))})


def hub_commit(path: Path) -> str | None:
    """The Hub's commit of a file or folder in its cache, where snapshots lie under their commits; else None."""
    above = path.absolute().parts
    return next((commit for name, commit in pairwise(above) if name == "snapshots"), None)
