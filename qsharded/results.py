"""The end of a run: the last checkpoint, then the adapter, so that a full disk costs neither."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qsharded import rerun, room
from qsharded.agreement import first_error, main_rank_does
from qsharded.assembly import Parts
from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.training import Progress, checkpoint_folder
from qsharded.checkpoint.writer import CheckpointNotWritten, CheckpointWriter
from qsharded.config import TrainConfig
from qsharded.divergence import has_diverged
from qsharded.durable import NotWritten
from qsharded.parallel import World


def save_refusal(config: TrainConfig, parts: Parts, progress: Progress) -> str | None:
    """Why no checkpoint is to be written of ``progress``, if so: for ``CheckpointWriter``."""
    if has_diverged(config, progress):
        return (
            f"{progress.skipped_since_start} steps were skipped, more than --max-skipped-steps "
            f"{config.max_skipped_steps}"
        )
    return room.lack_of_room(Path(config.output_dir), _sizes(config, parts))


def room_note(config: TrainConfig, parts: Parts) -> list[str]:
    """A line for the summary, where the disk does not hold all checkpoints that are still to come."""
    left = parts.total_steps - parts.progress.step
    saves = -(-left // config.save_steps) if config.save_steps else 0
    return room.room_note(config, _sizes(config, parts), saves)


def _sizes(config: TrainConfig, parts: Parts) -> room.Sizes:
    return room.Sizes.of((parameter for _, parameter in trainable(parts.model)), config.optim, parts.tokenizer.files)


def save(config: TrainConfig, parts: Parts, writer: CheckpointWriter) -> bool:
    """Have a checkpoint written of where the run stands; whether one is, or the writer's rules were against it."""
    return writer.save(
        parts.model,
        parts.lora,
        parts.optimizer,
        parts.progress,
        base_model=parts.base_model,
        revision=config.revision,
    )


def write_results(config: TrainConfig, world: World, parts: Parts, writer: CheckpointWriter) -> Path:
    """Write the last checkpoint (none under ``--save-steps 0``) and the adapter, whose folder is returned.

    The adapter is tried even where the checkpoint could not be written, and the other way about.

    Raises:
        NotWritten: the adapter; what was saved in its stead is said, and the command that writes it.
        CheckpointNotWritten: the checkpoint.
    """
    unsaved = _last_checkpoint(config, world, parts, writer)
    folder = Path(config.output_dir, "adapter")
    unwritten = first_error(world, _error_of(lambda: _write_adapter(config, world, parts, folder)))
    if unwritten is not None:
        raise NotWritten(f"{unwritten}. {_what_now(config, world, parts, unsaved)}")
    if unsaved is not None:
        raise CheckpointNotWritten(f"{unsaved}. The adapter was written to {folder}")
    writer.keep_newest()
    return folder


def _last_checkpoint(config: TrainConfig, world: World, parts: Parts, writer: CheckpointWriter) -> str | None:
    """Why there is none of the run's last step, on all ranks; None where it is there, or none was asked for."""
    error = first_error(world, _error_of(writer.wait))
    folder = checkpoint_folder(Path(config.output_dir), parts.progress.step)
    if not config.save_steps or error or main_rank_does(world, folder.is_dir):
        return error
    if not save(config, parts, writer):
        return f"checkpoint {folder} was not written: {writer.refused}"
    return first_error(world, _error_of(writer.wait))


def _error_of(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except (OSError, CheckpointNotWritten) as error:
        return error
    return None


def _write_adapter(config: TrainConfig, world: World, parts: Parts, folder: Path) -> None:
    try:
        save_adapter(
            parts.model,
            parts.lora,
            folder,
            base_model=parts.base_model,
            revision=config.revision,
            is_main=world.is_main,
        )
        if world.is_main:
            parts.tokenizer.copy_files(folder)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # an empty one would look like a result
        raise


def _what_now(config: TrainConfig, world: World, parts: Parts, unsaved: str | None) -> str:
    folder = checkpoint_folder(Path(config.output_dir), parts.progress.step)
    if unsaved is not None or not folder.is_dir():
        return f"No checkpoint holds the last step either{f': {unsaved}' if unsaved else ' (--save-steps 0)'}"
    again = rerun.command(config, world, resume_from_checkpoint="auto")
    return f"Checkpoint {folder} holds all of the training; make room, and have the adapter written by: {again}"
