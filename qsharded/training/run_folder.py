"""The folder that a training run writes to: what is in it, what may be replaced, where to go on from."""

import shutil
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from uuid import uuid4

from qsharded.checkpoint.intact import UNREADABLE, agreed_step, newest_sound, read_sound
from qsharded.checkpoint.resume import checkpoints, step_of
from qsharded.checkpoint.retention import delete_checkpoint, drop_partial_checkpoints, set_aside
from qsharded.config import TrainConfig, write_toml
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.report.run_files import (
    BEST_FOLDER,
    FINISHED_FILE,
    METRICS_FILE,
    RECORD_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SETTINGS_FILE,
    TENSORBOARD_FOLDER,
)
from qsharded.training import bad_batches, hang_report
from qsharded.training.disk_room import Sizes, refuse_full_disk
from qsharded.training.finished import is_marked
from qsharded.training.writable_output import refuse_unwritable
from qsharded.utils import collectives
from qsharded.utils.durable_files import folder_bytes, write_whole

_ADAPTER = "adapter"
_TRACES = (METRICS_FILE, SETTINGS_FILE, RECORD_FILE, REPORT_FILE, SAMPLES_FILE, FINISHED_FILE)
_REPORTS = (bad_batches.FOLDER, hang_report.FOLDER, TENSORBOARD_FOLDER)
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
    return found_by_main(world, partial(_look_for_checkpoint, config))


def _look_for_checkpoint(config: TrainConfig) -> Path | None:
    try:
        if config.resume_from_checkpoint == "auto":
            return newest_sound(Path(config.output_dir), partial(_warn, config))
        folder = Path(str(config.resume_from_checkpoint))
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        return read_sound(folder).folder
    except UNREADABLE as error:
        raise ValueError(f"--resume-from-checkpoint: {error}") from None


def _warn(config: TrainConfig, line: str) -> None:
    print(f"{config.prog}: {line}", file=sys.stderr)


def check_output_dir(config: TrainConfig, world: World, resume_from: Path | None) -> None:
    """Look before anything is loaded; nothing is deleted yet.

    Raises:
        ValueError: the folder holds an earlier run that is neither resumed nor to be replaced, the adapter to go on
            with lies in what is to be replaced, it cannot be written to, or there are checkpoints to write and not all
            ranks see the folder.
    """
    folder = Path(config.output_dir)
    may_be_done = _may_be_done(config)  # end_if_finished decides, once it can
    if not may_be_done:
        _refuse_losing_unreadable(config, resume_from)
    # "auto" may start afresh over a run that was stopped before it had anything to lose
    kept = _results(folder) if config.resume_from_checkpoint == "auto" else _results(folder) + _traces(folder)
    world.barrier()  # every rank has looked before the main one writes
    if kept and not _continues(folder, resume_from) and not config.overwrite_output_dir and not may_be_done:
        raise ValueError(
            f"{folder} holds an earlier run ({kept[0].name}); choose another --output-dir, replace it with "
            "--overwrite-output-dir, or, if it has checkpoints, continue it with --resume-from-checkpoint auto"
        )
    if config.adapter and Path(config.adapter).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--adapter {config.adapter} lies in --output-dir and would be replaced; choose another folder"
        )
    found_by_main(world, partial(_refuse_unwritable, config))
    if world.mesh is not None and config.save_steps:
        _check_seen_by_all(folder, world)


def _refuse_unwritable(config: TrainConfig) -> None:
    if not _may_be_done(config):
        refuse_unwritable(Path(config.output_dir), (_ADAPTER, BEST_FOLDER, "checkpoints"), _TRACES)


def _may_be_done(config: TrainConfig) -> bool:
    """Whether it may be that nothing is left to do or to write."""
    return config.resume_from_checkpoint == "auto" and is_marked(Path(config.output_dir))


def _refuse_losing_unreadable(config: TrainConfig, resume_from: Path | None) -> None:
    """A disk may be out of order for a while, and then give the checkpoints back."""
    folder = Path(config.output_dir)
    if config.resume_from_checkpoint == "auto" and resume_from is None and (found := checkpoints(folder)):
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} can be gone on from; choose another --output-dir, or "
            "replace them with --overwrite-output-dir and no --resume-from-checkpoint"
        )


def check_room(config: TrainConfig, world: World, resume_from: Path | None, sizes: Sizes) -> None:
    """See that the disk holds what the run must write, unless it may be done; what it will replace counts as free.

    Raises:
        ValueError: it does not.
    """
    folder = Path(config.output_dir)
    resumed = _continues(folder, resume_from)

    def look() -> None:
        if _may_be_done(config):
            return
        freed = 0 if resumed else folder_bytes(_results(folder))
        refuse_full_disk(config, sizes, freed=freed, resumed=resumed)

    found_by_main(world, look)


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
    file = folder / collectives.broadcast_object(f".seen-by-all-{uuid4().hex}", world.long_timeout_group)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    world.barrier()
    seen = collectives.all_gather_objects(_appears(file, patience_s), world.long_timeout_group)
    if world.is_main:
        file.unlink()
    return None if all(seen) else seen.index(False)


def _appears(path: Path, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def claim_output_dir(config: TrainConfig, world: World, resume_from: Path | None) -> None:
    """Delete what an earlier run left there, as far as this one does not continue it, and write config.toml.

    Raises:
        ValueError: the disk did not let it; on all ranks.
    """
    found_by_main(world, partial(_claim, config, resume_from))


def _claim(config: TrainConfig, resume_from: Path | None) -> None:
    folder = Path(config.output_dir)
    _refuse_losing_unreadable(config, resume_from)
    if resume_from and _continues(folder, resume_from):
        step = agreed_step(resume_from)  # its folder may have been renamed
        for path in [path for path in checkpoints(folder) if step_of(path) > step]:
            _drop_newer(config, path)
    else:
        _delete(_results(folder) + _traces(folder) + [folder / name for name in _REPORTS if (folder / name).exists()])
    (folder / FINISHED_FILE).unlink(missing_ok=True)  # there is more to come
    drop_partial_checkpoints(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SETTINGS_FILE, write_toml(config).encode())


def _drop_newer(config: TrainConfig, folder: Path) -> None:
    """Delete a checkpoint that is newer than the one gone back to, if it is known for one; else only move it away."""
    if config.resume_from_checkpoint != "auto" and _is_known(folder):
        delete_checkpoint(folder)
        return
    moved = set_aside(folder, "unreadable")
    _warn(config, f"{folder.name} could not be read and is kept as {moved}; delete it when you do not need it")


def _is_known(folder: Path) -> bool:
    try:
        agreed_step(folder)
    except UNREADABLE:
        return False
    return True


def _continues(folder: Path, resume_from: Path | None) -> bool:
    return resume_from is not None and resume_from.resolve().is_relative_to(folder.resolve())


def _results(folder: Path) -> list[Path]:
    return [path for path in (folder / _ADAPTER, folder / BEST_FOLDER, *checkpoints(folder)) if path.exists()]


def _traces(folder: Path) -> list[Path]:
    return [folder / name for name in _TRACES if (folder / name).exists()]


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
