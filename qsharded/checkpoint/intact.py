"""Which checkpoints of a run are sound: complete, of the bytes that were written, and of the step that they say.

Three places say a checkpoint's step: its folder's name, its manifest, and ``state.json``. Where they disagree it is
damaged, whichever of them is right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qsharded.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE
from qsharded.checkpoint.manifest import MANIFEST_FILE, DamagedCheckpoint, Manifest, read_manifest, verify
from qsharded.checkpoint.resume import (
    ADAPTER,
    OPTIMIZER,
    STATE_FILE,
    Progress,
    checkpoints,
    has_step_name,
    read_progress,
    step_of,
)

UNREADABLE = (ValueError, OSError, RecursionError)
"""What reading a checkpoint raises where it is damaged, of another version, or not to be read."""

_NEEDED = (STATE_FILE, f"{ADAPTER}/{CONFIG_FILE}", f"{ADAPTER}/{WEIGHTS_FILE}")


@dataclass(frozen=True)
class Checkpoint:
    """A sound one: its folder, the steps tried, and those of them that changed the weights."""

    folder: Path
    step: int
    applied_steps: int


def read_sound(folder: Path) -> Checkpoint:
    """Read all of a checkpoint.

    Raises:
        DamagedCheckpoint: it is damaged or incomplete, or says two different steps; the file is named.
        ValueError: a layout of another version.
        OSError: a file cannot be read.
    """
    manifest = verify(folder)
    _check_complete(folder, manifest)
    return Checkpoint(folder, manifest.step, _checked_progress(folder, manifest).applied_steps)


def agreed_step(folder: Path) -> int:
    """The step that all three places say; the large files are not looked at.

    Raises:
        as :func:`read_sound`.
    """
    manifest = read_manifest(folder)
    _checked_progress(folder, manifest)
    return manifest.step


def _checked_progress(folder: Path, manifest: Manifest) -> Progress:
    progress = read_progress(folder)
    if progress.step != manifest.step:
        raise DamagedCheckpoint(
            f"{folder} is damaged: {STATE_FILE} says step {progress.step!r}, {MANIFEST_FILE} {manifest.step}"
        )
    if has_step_name(folder) and step_of(folder) != manifest.step:
        raise DamagedCheckpoint(f"{folder} is named after another step than its {MANIFEST_FILE} says: {manifest.step}")
    return progress


def _check_complete(folder: Path, manifest: Manifest) -> None:
    missing = [name for name in _NEEDED if name not in manifest.files]
    if not any(name.startswith(OPTIMIZER) for name in manifest.files):
        missing.append(OPTIMIZER)
    if missing:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} is damaged: it lists no {missing[0]}")


def sound_checkpoints(output_dir: Path, report: Callable[[str], object]) -> Iterator[Checkpoint]:
    """Those of a run, newest first, each read when it is asked for; ``report`` is told of those passed over."""
    for folder in reversed(checkpoints(output_dir)):
        try:
            yield read_sound(folder)
        except UNREADABLE as error:
            report(f"{folder.name} is passed over: {error}")


def newest_sound(output_dir: Path, report: Callable[[str], object]) -> Path | None:
    """The newest checkpoint of a run that can be gone on from; ``report`` is told of newer ones."""
    return next((found.folder for found in sound_checkpoints(output_dir, report)), None)
