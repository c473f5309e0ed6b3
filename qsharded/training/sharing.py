"""``--push-to-hub`` of a run: the Hub is asked before anything is read, and gets the adapter at the end."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsharded.checkpoint.adapter import CONFIG_FILE
from qsharded.checkpoint.resume import ADAPTER
from qsharded.cli.hub import push_folder, writable_repository
from qsharded.config import TrainConfig
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.report.shareable import name_of
from qsharded.training.finished import is_marked
from qsharded.utils.untrusted_json import read_json


def with_repository(config: TrainConfig, world: World) -> TrainConfig:
    """``config`` with the whole name of the repository, which takes files. Every rank calls this; the main one asks.

    Raises:
        ValueError: it takes none; on every rank.
    """
    name = config.push_to_hub
    if name is None:
        return config
    found = found_by_main(world, partial(writable_repository, name, private=config.hub_private))
    return replace(config, push_to_hub=found)


def push_adapter(config: TrainConfig, world: World) -> None:
    """Upload the adapter of a run that is finished, if it is to go there, and say where it is. Every rank calls this
    and waits for the main one."""
    if config.push_to_hub is not None:
        found_by_main(world, partial(_push, config, config.push_to_hub))


def _push(config: TrainConfig, repository: str) -> None:
    folder = Path(config.output_dir)
    if not is_marked(folder):
        return
    adapter = folder / ADAPTER
    address = push_folder(adapter, repository, "Adapter trained with qsharded", partial(_shareable, adapter))
    if address:
        print(f"adapter uploaded to {address}")


def _shareable(folder: Path) -> dict[str, bytes]:
    """adapter_config.json with the base model's name in the place of its path on this machine."""
    described = read_json(folder / CONFIG_FILE)
    described["base_model_name_or_path"] = name_of(described["base_model_name_or_path"])
    return {CONFIG_FILE: (json.dumps(described, indent=2) + "\n").encode()}
