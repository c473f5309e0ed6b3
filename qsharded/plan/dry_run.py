"""``python -m qsharded.train --dry-run``: print the plan of a run and leave."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.load import parameter_count
from qsharded.checkpoint.packed_format import PackedCheckpoint, StorageFormat, read_storage_format
from qsharded.checkpoint.source import find_checkpoint
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.cli.base_model import find_adapter, lora_config
from qsharded.cli.command import compute_dtype
from qsharded.config import TrainConfig
from qsharded.models import CausalLM, ModelConfig
from qsharded.models.choice import AnyConfig, read_config
from qsharded.plan.alternatives import nearest
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Plan, Planner
from qsharded.plan.host_memory import HostVerdict, Need, disk, host_memory, host_verdict
from qsharded.plan.rendering import render, render_needs
from qsharded.plan.speed import Speed, estimate, tokens_of_a_step
from qsharded.plan.sweep import sweep
from qsharded.utils import hardware
from qsharded.utils.cards import CARDS, Card, card_called
from qsharded.utils.hardware import GIB
from qsharded.utils.untrusted_json import read_json

_RANKS_OF_A_HOST = 8  # of more GPUs than that, so many are taken to share a host
_MILLIONS = 100  # of tokens, where the plan is not told how many steps there are


def dry_run(config: TrainConfig) -> int:
    """Print what ``config`` takes; under torchrun, on the main rank only. Reads config.json and no weights; of a packed
    folder their names and the size of their blocks, and of one that ties a stored head, whether it is the embedding.

    Returns the exit status: 1 where the GPU is known and does not hold it.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    ranks = config.gpus or hardware.default_ranks()
    planner, described = planner_of(config)
    on_host = min(ranks, _RANKS_OF_A_HOST)
    chosen, line = choose_checkpointing(planner, config, ranks, _host_bytes(config) // on_host)
    plan = planner.plan(chosen, ranks)
    needs = host_memory(planner.model, plan)
    host = host_verdict(needs, on_host, None if _is_elsewhere(config) else _host_bytes(config))
    if os.environ.get("RANK", "0") == "0":
        print(_text(planner, plan, described, needs, host, line), end="", flush=True)
    return int(plan.fits is False or host.fits is False)


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
    model = read_config(described, config.model_code)
    if config.random_init:
        return model, None
    storage_format = read_storage_format(described)
    if not (Path(config.model).is_dir() and any(folder.glob("*.safetensors"))):
        return model, storage_format
    model, source = open_tied(folder, model)
    return model, PackedCheckpoint.at(source, storage_format)


def _is_elsewhere(config: TrainConfig) -> bool:
    """Whether other GPUs than this machine's are planned for, on a host of which nothing is said."""
    return config.host_memory_gib is None and (config.gpu is not None or config.gpu_memory_gib is not None)


def _host_bytes(config: TrainConfig) -> int:
    return int(config.host_memory_gib * GIB) if config.host_memory_gib else hardware.available_memory()


def _text(
    planner: Planner, plan: Plan, described: dict[str, Any], needs: list[Need], host: HostVerdict, line: str
) -> str:
    config, model = plan.config, planner.model
    available = f"{host.words}, all ranks together"
    free = f"{hardware.free_disk(Path(config.output_dir)) / GIB:.1f} free at {config.output_dir}"
    return "\n".join(
        [
            render(plan, nearest(planner, plan), host, [*_about(model, plan), *([line] if line else [])]),
            render_needs("host memory of a rank, GiB", needs, available),
            render_needs("disk, GiB", disk(model, config, described, is_packed=planner.packed is not None), free),
            *([sweep(planner, config)] if config.sweep else []),
        ]
    )


def _about(model: CausalLM, plan: Plan) -> list[str]:
    """Parameters, tokens of a step, and how fast, where the card is known."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = tokens_of_a_step(plan)
    lines = [
        f"parameters: {parameter_count(model):,} frozen, {trained:,} trained",
        f"tokens of an optimizer step: {tokens:,}, where every row is full (--packing fills them)",
    ]
    card = _card(plan.config)
    is_known = isinstance(model.config, ModelConfig)  # of transformers' models what they compute is not
    return lines if card is None or not is_known else [*lines, _how_fast(estimate(model, plan, card), plan.config)]


def _how_fast(speed: Speed, config: TrainConfig) -> str:
    steps = config.max_steps if config.max_steps > 0 else math.ceil(_MILLIONS * 1e6 / speed.tokens)
    what = f"{steps:,} steps" if config.max_steps > 0 else f"{_MILLIONS} million tokens"
    estimated = f"estimate, not measured: {speed.tokens_per_second:,.0f} tokens/s in all"
    return f"{estimated}; {what} take {_duration(steps * speed.step_s)}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return (
        f"{minutes / 60:.1f} hours"
        if minutes >= 60
        else f"{minutes:.0f} minutes"
        if minutes >= 2
        else f"{math.ceil(seconds)} s"
    )


def _card(config: TrainConfig) -> Card | None:
    """The one that is planned for, or this machine's; a memory size alone names none."""
    if config.gpu:
        return CARDS[config.gpu]
    return None if config.gpu_memory_gib else card_called(hardware.gpu_name() or "")


def _gpu_bytes(config: TrainConfig) -> int | None:
    gib = config.gpu_memory_gib or (CARDS[config.gpu].memory_gib if config.gpu else None)
    return hardware.gpu_memory() if gib is None else int(gib * GIB)
