"""What a run leaves at its end, or where it is stopped: its last checkpoint, then the adapter.

A full disk costs neither: both are tried, and the message says which is there and how to get the other.

Ranks that meet different errors here raise the same one, and ask each other in a group that waits for a slow disk.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.background_writer import CheckpointNotWritten, CheckpointWriter
from qsharded.checkpoint.base_identity import base_metadata
from qsharded.checkpoint.resume import ADAPTER, Progress, checkpoint_folder
from qsharded.cli.command_line import Again
from qsharded.config import TrainConfig
from qsharded.distributed.agreement import first_error, found_by_main
from qsharded.distributed.fsdp import World
from qsharded.training import disk_room
from qsharded.training.divergence import advice, has_diverged, skipped_more_than_allowed
from qsharded.training.finished import mark_finished
from qsharded.training.run_folder import rank_without_sight
from qsharded.training.setup import Parts
from qsharded.utils.durable_files import NotWritten

_SEEN_WITHIN_S = 5.0  # of the 25 s in which a stopped run is to be saved


def save_refusal(config: TrainConfig, parts: Parts, progress: Progress) -> str | None:
    """Why no checkpoint is to be written of ``progress``, if so: for ``CheckpointWriter``."""
    if has_diverged(config, progress):
        return skipped_more_than_allowed(config, progress)
    return disk_room.lack_of_room(Path(config.output_dir), _sizes(config, parts))


def room_note(config: TrainConfig, parts: Parts) -> list[str]:
    """A line for the summary, where the disk does not hold all checkpoints that are still to come."""
    left = parts.total_steps - parts.progress.step
    saves = -(-left // config.save_steps) if config.save_steps else 0
    return disk_room.room_note(config, _sizes(config, parts), saves)


def _sizes(config: TrainConfig, parts: Parts) -> disk_room.Sizes:
    parameters = (parameter for _, parameter in trainable(parts.model))
    return disk_room.Sizes.of(parameters, config.optim, parts.tokenizer.files)


def save(config: TrainConfig, parts: Parts, writer: CheckpointWriter) -> str | None:
    """Have a checkpoint written of where the run stands. Returns why none is, where ``save_refusal`` is against it."""
    return writer.save(
        parts.model,
        parts.lora,
        parts.optimizer,
        parts.progress,
        base_model=parts.base_model,
        revision=config.revision,
    )


def write_results(config: TrainConfig, world: World, parts: Parts, writer: CheckpointWriter, again: Again) -> Path:
    """Write what a run that is at its end leaves: its checkpoint (none under ``--save-steps 0``), the adapter, whose
    folder is returned, and the mark that it is finished.

    The adapter is tried even where the checkpoint could not be written, and the other way about.

    Raises:
        NotWritten: the adapter, or the mark; what was saved in its stead is said, and the command that writes it.
        CheckpointNotWritten: the checkpoint.
    """
    unsaved = _save_now(config, world, parts, writer) if config.save_steps else None
    adapter = _write_adapter(config, world, parts, unsaved, again)
    unmarked = first_error(world, _error_of(partial(mark_finished, config, parts.progress)) if world.is_main else None)
    if unsaved or unmarked:
        kind = CheckpointNotWritten if unsaved else NotWritten
        raise kind(f"{unsaved or unmarked}. The adapter was written to {adapter}")
    writer.keep_newest()
    return adapter


def save_stopped(config: TrainConfig, world: World, parts: Parts, writer: CheckpointWriter, again: Again) -> str:
    """Write what a run that is stopped leaves: the checkpoint of its last complete step, with ``--save-steps 0`` too,
    and the adapter so far. Returns what was saved, and how to go on.

    Of a run that has diverged nothing is: what its end would have said is returned.

    Raises:
        NotWritten, CheckpointNotWritten: as :func:`write_results`.
    """
    if has_diverged(config, parts.progress):
        return f"nothing was saved, as {after_divergence(config, world, parts.progress, writer, again)}"
    # with --save-steps 0 nobody has looked yet
    blind = None if config.save_steps else rank_without_sight(Path(config.output_dir), world, _SEEN_WITHIN_S)
    if blind is not None:
        why = f"rank {blind} does not see what rank 0 writes to --output-dir"
        adapter = _write_adapter(config, world, parts, why, again)
        start = f"start from it with --adapter {adapter}"
        return f"saved no checkpoint, as {why}, and the adapter so far in {adapter}; {start}"
    unsaved = _save_now(config, world, parts, writer)
    adapter = _write_adapter(config, world, parts, unsaved, again)
    if unsaved:
        raise CheckpointNotWritten(f"{unsaved}. The adapter so far was written to {adapter}")
    go_on = again(resume_from_checkpoint="auto")
    return f"saved {_folder(config, parts)}, and the adapter so far in {adapter}; go on with: {go_on}"


def after_divergence(
    config: TrainConfig, world: World, progress: Progress, writer: CheckpointWriter, again: Again
) -> str:
    """What happened to a run that has diverged, and the command that goes on. Every rank calls this."""
    writer.wait()  # what is being written may be what the advice is to go back to
    return found_by_main(world, lambda: advice(config, progress, again))


def _save_now(config: TrainConfig, world: World, parts: Parts, writer: CheckpointWriter) -> str | None:
    """Have the checkpoint of the last complete step on the disk. Returns why it is not, on all ranks."""
    if error := first_error(world, _error_of(writer.settle)):
        return error
    folder = _folder(config, parts)
    if found_by_main(world, folder.is_dir):
        return None
    if refusal := save(config, parts, writer):
        return f"checkpoint {folder} was not written: {refusal}"
    return first_error(world, _error_of(writer.wait))


def _folder(config: TrainConfig, parts: Parts) -> Path:
    return checkpoint_folder(Path(config.output_dir), parts.progress.step)


def _error_of(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except (OSError, CheckpointNotWritten) as error:
        return error
    return None


def _write_adapter(config: TrainConfig, world: World, parts: Parts, unsaved: str | None, again: Again) -> Path:
    """Every rank calls this; the main one writes. ``unsaved``: why there is no checkpoint of this step."""
    folder = Path(config.output_dir, ADAPTER)
    unwritten = first_error(world, _error_of(lambda: _try_adapter(config, world, parts, folder)))
    if unwritten is not None:
        what_now = found_by_main(world, partial(_what_now, _folder(config, parts), unsaved, again))
        raise NotWritten(f"{unwritten}. {what_now}")
    return folder


def _try_adapter(config: TrainConfig, world: World, parts: Parts, folder: Path) -> None:
    try:
        save_adapter(
            parts.model,
            parts.lora,
            folder,
            base_model=parts.base_model,
            revision=config.revision,
            metadata=base_metadata(parts.progress.base),
            is_main=world.is_main,
        )
        if world.is_main:
            parts.tokenizer.copy_files(folder)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # an empty one would look like a result
        raise


def _what_now(checkpoint: Path, unsaved: str | None, again: Again) -> str:
    if unsaved is not None or not checkpoint.is_dir():
        return f"No checkpoint holds the last step either{f': {unsaved}' if unsaved else ' (--save-steps 0)'}"
    go_on = again(resume_from_checkpoint="auto")
    return f"Checkpoint {checkpoint} holds all of the training; make room, and have the adapter written by: {go_on}"
