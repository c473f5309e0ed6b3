"""``python -m qsharded.train --dry-run``: print the plan of a run and leave."""

import os
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.packed_format import PackedCheckpoint, StorageFormat, read_storage_format
from qsharded.checkpoint.source import find_checkpoint
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.cli.base_model import find_adapter, lora_config
from qsharded.cli.command import compute_dtype
from qsharded.config import TrainConfig
from qsharded.models.choice import AnyConfig, read_config
from qsharded.plan.alternatives import nearest
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Plan, Planner
from qsharded.plan.host_memory import disk, host_memory
from qsharded.plan.rendering import render, render_needs
from qsharded.utils import hardware
from qsharded.utils.hardware import GIB
from qsharded.utils.untrusted_json import read_json


def dry_run(config: TrainConfig) -> int:
    """Print what ``config`` takes; under torchrun, on the main rank only. Reads config.json and no weights; of a packed
    folder their names and the size of their blocks, and of one that ties a stored head, whether it is the embedding.

    Returns the exit status: 1 where the GPU is known and does not hold it.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    ranks = config.gpus or hardware.default_ranks()
    planner, described = planner_of(config)
    chosen, line = choose_checkpointing(planner, config, ranks, hardware.available_memory() // ranks)
    plan = planner.plan(chosen, ranks)
    if os.environ.get("RANK", "0") == "0":
        print("".join(f"{one}\n" for one in (line, _text(planner, plan, described)) if one), end="", flush=True)
    return int(plan.fits is False)


def planner_of(config: TrainConfig) -> tuple[Planner, dict[str, Any]]:
    """What plans runs of ``config``'s model, and its config.json.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    folder = find_checkpoint(config.model, config.revision, weights=False)
    described = read_json(folder / "config.json")
    adapter = find_adapter(config.adapter) if config.adapter else None
    dtype = compute_dtype(config.dtype, torch.device("cuda"))
    model_config, packed = _model(config, folder, described)
    return Planner(model_config, lora_config(config, adapter), dtype, _gpu_bytes(config), packed), described


def _model(
    config: TrainConfig, folder: Path, described: dict[str, Any]
) -> tuple[AnyConfig, PackedCheckpoint | StorageFormat | None]:
    """The model and what of it is packed; of a Hub id, and of a folder without its weights, only how."""
    model, storage_format = read_config(described, config.model_code), read_storage_format(described)
    if config.random_init:
        return model, None
    if not (Path(config.model).is_dir() and any(folder.glob("*.safetensors"))):
        return model, storage_format
    model, source = open_tied(folder, model)
    return model, PackedCheckpoint.at(source, storage_format)


def _text(planner: Planner, plan: Plan, described: dict[str, Any]) -> str:
    config, model = plan.config, planner.model
    available = f"this machine has {hardware.available_memory() / GIB:.1f} available"
    free = f"{hardware.free_disk(Path(config.output_dir)) / GIB:.1f} free at {config.output_dir}"
    return "\n".join(
        [
            render(plan, nearest(planner, plan)),
            render_needs("host memory of a rank, GiB", host_memory(model, plan), available),
            render_needs("disk, GiB", disk(model, config, described, is_packed=planner.packed is not None), free),
        ]
    )


def _gpu_bytes(config: TrainConfig) -> int | None:
    return hardware.gpu_memory() if config.gpu_memory_gib is None else int(config.gpu_memory_gib * GIB)
