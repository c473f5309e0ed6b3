"""The folder that a training run writes to: what is in it, what may be replaced, where to go on from."""

import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from qsharded.checkpoint.manifest import read_manifest, verify
from qsharded.checkpoint.training import checkpoints, drop_partial_checkpoints, newest_valid, step_of
from qsharded.config import TrainConfig, write_toml
from qsharded.finished import FINISHED_FILE, is_marked
from qsharded.parallel import World

_ADAPTER, _TRACES = "adapter", ("metrics.jsonl", "config.toml", FINISHED_FILE)
_VISIBLE_AFTER_S = 60.0  # a network file system may remember for so long that a file was not there
_POLL_S = 0.1


def find_resumed(config: TrainConfig, world: World) -> Path | None:
    """The checkpoint to go on from: the one named, the newest valid one ("auto"), or None to start afresh.

    Raises:
        ValueError: the named one is no folder, or is damaged; its file is named.
    """
    if config.resume_from_checkpoint is None:
        return None
    # The main rank looks: a checkpoint's files are read once, and ranks that each chose could choose differently.
    found = [_look_for_checkpoint(config)] if world.is_main else [None]
    world.barrier()  # reading takes a while
    if world.mesh is not None:
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise ValueError(f"--resume-from-checkpoint: {found[0]}")
    return found[0]


def _look_for_checkpoint(config: TrainConfig) -> Path | str | None:
    """The same on one rank, where a mistake is returned as what is to be said of it."""
    try:
        if config.resume_from_checkpoint == "auto":
            return newest_valid(Path(config.output_dir), lambda line: print(f"{config.prog}: {line}", file=sys.stderr))
        folder = Path(str(config.resume_from_checkpoint))
        if not folder.is_dir():
            return f"{folder} is no folder"
        verify(folder)
        return folder
    except (ValueError, OSError) as error:
        return str(error)


def check_output_dir(config: TrainConfig, world: World, resume_from: Path | None) -> None:
    """Look before anything is loaded; nothing is deleted yet.

    Raises:
        ValueError: the folder holds an earlier run that is neither resumed nor to be replaced, the adapter to go on
            with lies in what is to be replaced, or there are checkpoints to write and not all ranks see the folder.
    """
    folder = Path(config.output_dir)
    # "auto" may start afresh over a run that was stopped before it had anything to lose
    kept = _results(folder) if config.resume_from_checkpoint == "auto" else _results(folder) + _traces(folder)
    world.barrier()  # every rank has looked before the main one writes
    may_be_done = config.resume_from_checkpoint == "auto" and is_marked(folder)  # end_if_finished decides, once it can
    if kept and not _continues(folder, resume_from) and not config.overwrite_output_dir and not may_be_done:
        raise ValueError(
            f"{folder} holds an earlier run ({kept[0].name}); choose another --output-dir, replace it with "
            "--overwrite-output-dir, or, if it has checkpoints, continue it with --resume-from-checkpoint auto"
        )
    if config.adapter and Path(config.adapter).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--adapter {config.adapter} lies in --output-dir and would be replaced; choose another folder"
        )
    if world.mesh is not None and config.save_steps:
        _check_seen_by_all(folder, world)


def _check_seen_by_all(folder: Path, world: World) -> None:
    """A checkpoint is made of files of all ranks, so a folder that each node has for itself is found out here."""
    blind = rank_without_sight(folder, world, _VISIBLE_AFTER_S)
    if blind is not None:
        raise ValueError(
            f"rank {blind} does not see what rank 0 writes to --output-dir {folder}: checkpoints need a "
            "file system that all nodes share; give a folder there, or --save-steps 0"
        )


def rank_without_sight(folder: Path, world: World, patience_s: float) -> int | None:
    """The first rank that does not see what the main one writes to ``folder``, or None. Every rank calls this."""
    if world.mesh is None:
        return None
    name = [f".seen-by-all-{uuid4().hex}"]
    dist.broadcast_object_list(name, src=0, group=world.patient)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name[0]).touch()
    world.barrier()
    seen = [True] * world.size
    dist.all_gather_object(seen, _appears(folder / name[0], patience_s), group=world.patient)
    if world.is_main:
        (folder / name[0]).unlink()
    return None if all(seen) else seen.index(False)


def _appears(path: Path, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def claim_output_dir(config: TrainConfig, world: World, resume_from: Path | None) -> None:
    """Delete what an earlier run left there, as far as this one does not continue it, and write config.toml."""
    if not world.is_main:
        return
    folder = Path(config.output_dir)
    if resume_from and _continues(folder, resume_from):
        step = read_manifest(resume_from).step  # its folder may have been renamed
        _delete(path for path in checkpoints(folder) if step_of(path) > step)
    else:
        _delete(_results(folder) + _traces(folder))
    (folder / FINISHED_FILE).unlink(missing_ok=True)  # there is more to come
    drop_partial_checkpoints(folder)
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
