"""Which checkpoints of a run stay. Folders go by what was read of them in full, never by what a damaged file says.

A checkpoint is *proved* once a later step's gradient was finite and changed the weights: the gradient was taken at the
checkpoint's own weights, so a run can go on from it. The newest checkpoint is not proved yet: a rate that is too high
writes one whose every gradient is NaN.
"""

import shutil
from pathlib import Path

from qsharded.checkpoint.intact import Checkpoint, sound_checkpoints
from qsharded.checkpoint.resume import PARTIAL, checkpoints, step_of
from qsharded.utils.durable_files import sync_folder


def newest_proved(output_dir: Path, applied_steps: int) -> Checkpoint | None:
    """The newest sound checkpoint that a run is past which changed the weights in so many steps."""
    found = sound_checkpoints(output_dir, lambda line: None)
    return next((checkpoint for checkpoint in found if checkpoint.applied_steps < applied_steps), None)


def drop_old_checkpoints(output_dir: Path, keep: int | None, applied_steps: int | None = None) -> None:
    """Delete what is older than the newest ``keep`` sound checkpoints; None keeps all.

    With ``applied_steps``, the run's steps that changed the weights, the newest proved checkpoint stays too. What is
    not sound does not count: with fewer sound ones than ``keep`` all stay.
    """
    folders = checkpoints(output_dir)
    if keep is None or len(folders) <= keep:
        return
    kept, proved = _newest(output_dir, keep, applied_steps)
    if len(kept) < keep:
        return
    for folder in folders:
        if step_of(folder) < kept[-1].step and (proved is None or folder != proved.folder):
            delete_checkpoint(folder)


def _newest(output_dir: Path, keep: int, applied_steps: int | None) -> tuple[list[Checkpoint], Checkpoint | None]:
    """The newest so many sound checkpoints, newest first, and the newest from the last of them on that is proved, or
    that last one itself where none need be."""
    kept: list[Checkpoint] = []
    for checkpoint in sound_checkpoints(output_dir, lambda line: None):
        if len(kept) < keep:
            kept.append(checkpoint)
        if len(kept) == keep and (applied_steps is None or checkpoint.applied_steps < applied_steps):
            return kept, checkpoint
    return kept, None


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; one that is only half deleted when the process dies no longer has a checkpoint's name."""
    doomed = folder.with_name(folder.name + PARTIAL)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def drop_partial_checkpoints(output_dir: Path) -> None:
    """Delete what a run left that died while it was writing or deleting one."""
    for folder in (output_dir / "checkpoints").glob(f"step-*{PARTIAL}"):
        if folder.is_dir():
            shutil.rmtree(folder)


def set_aside(folder: Path, why: str) -> Path:
    """Give a checkpoint a name that is none of a checkpoint's, ended by ``why``, and return it; nothing is deleted."""
    names = (f"{folder.name}.{why}{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(path for path in (folder.with_name(name) for name in names) if not path.exists())
    folder.rename(target)
    sync_folder(target.parent)
    return target
