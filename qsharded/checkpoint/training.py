"""Checkpoints of a run: adapter, optimizer state and place in the data. Written beside, renamed when complete."""

import json
import shutil
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from qsharded import parallel
from qsharded.checkpoint.adapter import (
    CONFIG_FILE,
    copy_rows,
    load_adapter,
    open_weights,
    peft_config,
    save_adapter,
    trainable,
)
from qsharded.checkpoint.source import read_json
from qsharded.nn import LoRAConfig
from qsharded.optim import PagedAdamW8bit

_STATE_FILE, _OPTIMIZER_FILE, _ADAPTER = "state.json", "optimizer.safetensors", "adapter"


@dataclass
class Progress:
    """Where a run stands; with adapter and optimizer state, all that an identical continuation needs.

    Random numbers need no state of their own: each step draws from a generator seeded by (seed, step, rank).

    Attributes:
        step: optimizer steps tried, the skipped ones included.
        epoch, row: the data's cursor.
        skipped_steps: steps left out for a gradient that was not finite.
        window: what has been summed since the last log line.
        settings: what decides which rows a step takes; a run is resumed under the same settings only.
    """

    step: int = 0
    epoch: int = 0
    row: int = 0
    skipped_steps: int = 0
    window: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    lora: LoRAConfig,
    optimizer: Optimizer,
    progress: Progress,
    *,
    base_model: str,
    is_main: bool,
) -> None:
    """Write a checkpoint to ``folder``. Every rank calls this; the main rank writes, and renames when complete."""
    partial = folder.with_name(folder.name + ".partial")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    save_adapter(model, lora, partial / _ADAPTER, base_model=base_model, is_main=is_main)
    state = _gathered_state(model, optimizer, is_main)
    if is_main:
        save_file(state, partial / _OPTIMIZER_FILE)
        (partial / _STATE_FILE).write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _gathered_state(model: nn.Module, optimizer: Optimizer, is_main: bool) -> dict[str, Tensor]:
    if isinstance(optimizer, PagedAdamW8bit):
        return _runs_of_all_ranks(model, optimizer)
    gathered: dict[str, Tensor] = {}
    for name, parameter in trainable(model):
        for key, value in optimizer.state[parameter].items():
            full = parallel.whole(value)
            if is_main:
                gathered[f"{name}:{key}"] = full.cpu().contiguous()
    return gathered


def _runs_of_all_ranks(model: nn.Module, optimizer: PagedAdamW8bit) -> dict[str, Tensor]:
    """Each rank's state of its own rows, which their numbers name."""
    mine = {}
    for name, parameter in trainable(model):
        rows = parallel.own_rows(parameter)
        for key, value in optimizer.parameter_state(parameter).items():
            mine[f"{name}:{rows.start}-{rows.stop}:{key}"] = value.cpu().clone()
    if not dist.is_initialized():
        return mine
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {key: value for rank in ranks for key, value in rank.items()}


def _load_runs(file: Any, name: str, parameter: Tensor, optimizer: PagedAdamW8bit) -> None:
    runs: dict[tuple[int, int], _Run] = {}
    for key in file.keys():  # noqa: SIM118  not a dict
        of, _, rest = key.rpartition(":")[0].rpartition(":")
        if of == name:
            start, stop = map(int, rest.split("-"))
            runs.setdefault((start, stop), _Run(start, stop, {})).tensors[key.rpartition(":")[2]] = file.get_tensor(key)
    optimizer.set_parameter_state(parameter, [runs[key] for key in sorted(runs)])


@dataclass
class _Run:
    start: int
    stop: int
    tensors: dict[str, Tensor]


def load_checkpoint(
    folder: Path, model: nn.Module, lora: LoRAConfig, optimizer: Optimizer, settings: Mapping[str, Any]
) -> Progress:
    """Fill adapter and optimizer from ``folder``, each rank its own rows, and return where the run stood.

    Raises:
        ValueError: a file that is missing, damaged, or of another model; an adapter of other settings than ``lora``, or
            a run of others than ``settings``.
    """
    progress = _read_progress(folder / _STATE_FILE)
    adapter = read_json(folder / _ADAPTER / CONFIG_FILE)
    _refuse_other(peft_config(model, lora, ""), adapter, folder, leave={"base_model_name_or_path", "revision"})
    _refuse_other(settings, progress.settings, folder)
    load_adapter(model, folder / _ADAPTER)
    path = folder / _OPTIMIZER_FILE
    with open_weights(path) as file:
        for name, parameter in trainable(model):
            if isinstance(optimizer, PagedAdamW8bit):
                _load_runs(file, name, parameter, optimizer)
                continue
            keys = [key for key in file.keys() if key.startswith(f"{name}:")]  # noqa: SIM118  not a dict
            optimizer.state[parameter] = {
                key.rpartition(":")[2]: _read_state(file, key, parameter, path) for key in keys
            }
    return progress


def _refuse_other(now: Mapping[str, Any], then: Mapping[str, Any], folder: Path, leave: Container[str] = ()) -> None:
    for key, value in now.items():
        if key not in leave and then.get(key) != value:
            raise ValueError(
                f"{folder} was written with {key} = {then.get(key)!r}, this run has {value!r}: resume it alike"
            )


def _read_progress(path: Path) -> Progress:
    try:
        return Progress(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} is not of this version: {error}") from None


def _read_state(file: Any, key: str, parameter: Tensor, path: Path) -> Tensor:
    """State of the parameter's shape is sharded like it; anything else (a step count) is whole on every rank."""
    shape = tuple(file.get_slice(key).get_shape())
    if shape != tuple(parameter.shape):
        return file.get_tensor(key)
    value = torch.zeros_like(parameter)
    copy_rows(file, key, value, path)
    return value


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run that were written to the end, oldest first."""
    return [folder for folder in checkpoints(output_dir) if (folder / _STATE_FILE).is_file()]


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = (output_dir / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if folder.suffix != ".partial"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its folder's name; -1 for one that was renamed."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def drop_old_checkpoints(output_dir: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints; None keeps all."""
    if keep is not None:
        _delete(complete_checkpoints(output_dir)[:-keep])


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
