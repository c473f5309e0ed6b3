"""What a run does whose gradients are no longer finite: when it stops, what it may save, and where to go back to."""

from pathlib import Path

from qsharded.checkpoint.resume import Progress, checkpoints, step_of
from qsharded.checkpoint.retention import newest_proved, set_aside
from qsharded.cli.command_line import Again
from qsharded.config import TrainConfig
from qsharded.config.options import options
from qsharded.training.bad_batches import rows_of

_LISTED = 4  # rows that the message has room for
_SLOWER = 10  # the next learning rate to try is this much lower, and no higher than the option's default
_DEFAULT_RATE = next(item.default for item in options(TrainConfig) if item.name == "learning_rate")


class SkippedTooOften(RuntimeError):
    """More steps had a gradient that is not finite than ``--max-skipped-steps`` allows."""


def has_diverged(config: TrainConfig, progress: Progress) -> bool:
    """Whether more steps were skipped since the run was started or resumed than ``--max-skipped-steps`` allows.

    Such a run stops at its next log line, and until then saves nothing: its weights may be what is wrong.
    """
    return progress.skipped_since_start > config.max_skipped_steps


def skipped_more_than_allowed(config: TrainConfig, progress: Progress) -> str:
    """What has happened to a run that has diverged."""
    return (
        f"{progress.skipped_since_start} steps were skipped by step {progress.step} because their gradient was not "
        f"finite, --max-skipped-steps allows {config.max_skipped_steps}"
    )


def advice(config: TrainConfig, progress: Progress, again: Again) -> str:
    """What happened, and the command that goes on. The main rank calls this, once nothing is being written.

    Checkpoints that no finite gradient was ever taken at are set aside, where there is an older one to go back to:
    ``--resume-from-checkpoint auto`` would take them, and stop again.
    """
    happened = skipped_more_than_allowed(config, progress)
    rows = rows_of(Path(config.output_dir))
    listed = f" ({', '.join(rows[:_LISTED])}{' ...' if len(rows) > _LISTED else ''}; not-finite/ there has their texts)"
    happened += f". Lower --learning-rate, or look for damaged rows in the dataset{listed if rows else ''}. "
    output_dir, rate = Path(config.output_dir), _lower(config.learning_rate)
    proved = newest_proved(output_dir, progress.applied_steps)
    if proved is None:
        start = again(output_dir=_free_name(output_dir), learning_rate=rate, resume_from_checkpoint="auto")
        return happened + f"No checkpoint is fit to go back to; to start again: {start}"
    newer = [folder for folder in checkpoints(output_dir) if step_of(folder) > proved.step]
    moved = [set_aside(folder, "diverged").name for folder in newer]
    told = f" (what came after it is kept as {', '.join(moved)})" if moved else ""
    back = again(resume_from_checkpoint=str(proved.folder), learning_rate=rate)
    return happened + f"Go back to {proved.folder.name}{told}: {back}"


def _lower(rate: float) -> str:
    return f"{min(rate / _SLOWER, _DEFAULT_RATE):g}"


def _free_name(folder: Path) -> str:
    """Another output folder, so that starting again deletes nothing."""
    names = (f"{folder}-{number}" for number in range(2, 1000))
    return next(name for name in names if not Path(name).exists())
