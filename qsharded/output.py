"""The folder that a training run writes to: what is in it, what may be replaced, where to go on from."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from qsharded.checkpoint.training import checkpoints, complete_checkpoints, step_of
from qsharded.config import TrainConfig, write_toml
from qsharded.parallel import World

_ADAPTER, _TRACES = "adapter", ("metrics.jsonl", "config.toml")


def find_resumed(config: TrainConfig, world: World) -> Path | None:
    """The checkpoint to go on from: the one named, the newest complete one ("auto"), or None to start afresh.

    Raises:
        ValueError: the named one is no folder.
    """
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "auto":
        newest = [next(reversed(complete_checkpoints(Path(config.output_dir))), None)]
        if world.mesh is not None:  # ranks that each looked for themselves could choose differently
            dist.broadcast_object_list(newest, src=0)
        return newest[0]
    folder = Path(config.resume_from_checkpoint)
    if not folder.is_dir():
        raise ValueError(f"--resume-from-checkpoint: {folder} is no folder")
    return folder


def check_output_dir(config: TrainConfig, world: World, resume_from: Path | None) -> None:
    """Look before anything is loaded; nothing is written or deleted yet.

    Raises:
        ValueError: the folder holds an earlier run that is neither resumed nor to be replaced, or the adapter to go on
            with lies in what is to be replaced.
    """
    folder = Path(config.output_dir)
    # "auto" may start afresh over a run that was stopped before it had anything to lose
    kept = _results(folder) if config.resume_from_checkpoint == "auto" else _results(folder) + _traces(folder)
    world.barrier()  # every rank has looked before the main one writes
    if kept and not _continues(folder, resume_from) and not config.overwrite_output_dir:
        raise ValueError(
            f"{folder} holds an earlier run ({kept[0].name}); choose another --output-dir, replace it with "
            "--overwrite-output-dir, or, if it has checkpoints, continue it with --resume-from-checkpoint auto"
        )
    if config.adapter and Path(config.adapter).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--adapter {config.adapter} lies in --output-dir and would be replaced; choose another folder"
        )


def claim_output_dir(config: TrainConfig, world: World, resume_from: Path | None) -> None:
    """Delete what an earlier run left there, as far as this one does not continue it, and write config.toml."""
    if not world.is_main:
        return
    folder = Path(config.output_dir)
    if resume_from and _continues(folder, resume_from):
        _delete(path for path in checkpoints(folder) if step_of(path) > step_of(resume_from))
    else:
        _delete(_results(folder) + _traces(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(write_toml(config), encoding="utf-8")


def _continues(folder: Path, resume_from: Path | None) -> bool:
    return resume_from is not None and resume_from.resolve().is_relative_to(folder.resolve())


def _results(folder: Path) -> list[Path]:
    return [path for path in (folder / _ADAPTER, *checkpoints(folder)) if path.exists()]


def _traces(folder: Path) -> list[Path]:
    return [folder / name for name in _TRACES if (folder / name).exists()]


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
