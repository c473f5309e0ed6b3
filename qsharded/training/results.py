"""What a run leaves at its end, or where it is stopped: its last checkpoint, then the adapter.

A full disk costs neither: both are tried, and the message says which is there and how to get the other.

Ranks that meet different errors here raise the same one, and ask each other in a group that waits for a slow disk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.background_writer import CheckpointNotWritten, CheckpointWriter
from qsharded.checkpoint.base_identity import base_metadata
from qsharded.checkpoint.files import write_json
from qsharded.checkpoint.initial_adapter import copy_initial, initial_metadata
from qsharded.checkpoint.resume import ADAPTER, Progress, checkpoint_folder
from qsharded.cli.command_line import Again
from qsharded.config import TrainConfig
from qsharded.distributed.agreement import first_error, found_by_main
from qsharded.distributed.world import World
from qsharded.report.run_files import BEST_FILE, BEST_FOLDER
from qsharded.training import disk_room
from qsharded.training.best import Best
from qsharded.training.divergence import advice, has_diverged, skipped_more_than_allowed
from qsharded.training.finished import mark_finished
from qsharded.training.model_cards import write_card
from qsharded.training.run_folder import rank_without_sight
from qsharded.training.setup import TrainingSetup
from qsharded.utils.durable_files import Displaced, NotWritten

_SEEN_WITHIN_S = 5.0  # of the 25 s in which a stopped run is to be saved


def save_refusal(config: TrainConfig, setup: TrainingSetup, progress: Progress) -> str | None:
    """Why no checkpoint is to be written of ``progress``, if so: for ``CheckpointWriter``."""
    if has_diverged(config, progress):
        return skipped_more_than_allowed(config, progress)
    return disk_room.lack_of_room(Path(config.output_dir), _sizes(config, setup))


def room_note(config: TrainConfig, setup: TrainingSetup) -> list[str]:
    """A line for the summary, where the disk does not hold all checkpoints that are still to come."""
    left = setup.total_steps - setup.progress.step
    saves = -(-left // config.save_steps) if config.save_steps else 0
    return disk_room.room_note(config, _sizes(config, setup), saves)


def _sizes(config: TrainConfig, setup: TrainingSetup) -> disk_room.Sizes:
    parameters = (parameter for _, parameter in trainable(setup.model))
    return disk_room.Sizes.of(parameters, config.optim, setup.tokenizer.files)


@dataclass(frozen=True)
class Results:
    """The files of a run, as its ranks write them together: every rank calls each method.

    Attributes:
        again: gives the command that goes on, for what is told.
    """

    config: TrainConfig
    world: World
    setup: TrainingSetup
    writer: CheckpointWriter
    again: Again

    @property
    def checkpoint(self) -> Path:
        """The folder of the last complete step's checkpoint, written or not."""
        return checkpoint_folder(Path(self.config.output_dir), self.setup.progress.step)

    def save(self) -> str | None:
        """Have a checkpoint written of where the run stands. Returns why none is, where ``save_refusal`` is against
        it."""
        return self.writer.save(
            self.setup.model,
            self.setup.lora,
            self.setup.optimizer,
            self.setup.progress,
            base_model=self.setup.base_model,
            revision=self.config.revision,
            beside_adapter=self.setup.tokenizer.template_files,
        )

    def write(self) -> Path:
        """Write what a run that is at its end leaves: its checkpoint (none under ``--save-steps 0``), the adapter,
        whose folder is returned, and the mark that it is finished.

        The adapter is tried even where the checkpoint could not be written, and the other way about.

        Raises:
            NotWritten: the adapter, or the mark; what was saved in its stead is said, and the command that writes it.
            CheckpointNotWritten: the checkpoint.
        """
        unsaved = self._save_now() if self.config.save_steps else None
        adapter = self._write_adapter(unsaved)
        mark = partial(mark_finished, self.config, self.setup.progress, self.setup.total_steps)
        unmarked = first_error(self.world, _error_of(mark) if self.world.is_main else None)
        if unsaved or unmarked:
            kind = CheckpointNotWritten if unsaved else NotWritten
            raise kind(f"{unsaved or unmarked}. The adapter was written to {adapter}")
        self.writer.keep_newest()
        return adapter

    def save_stopped(self) -> str:
        """Write what a run that is stopped leaves: the checkpoint of its last complete step, with ``--save-steps 0``
        too, and the adapter so far. Returns what was saved, and how to go on.

        Of a run that has diverged nothing is: what its end would have said is returned.

        Raises:
            NotWritten, CheckpointNotWritten: as :meth:`write`.
        """
        if has_diverged(self.config, self.setup.progress):
            return f"nothing was saved, as {self.after_divergence()}"
        blind = self._blind_rank()
        if blind is not None:
            why = f"rank {blind} does not see what rank 0 writes to --output-dir"
            adapter = self._write_adapter(why)
            start = f"start from it with --adapter {adapter}"
            return f"saved no checkpoint, as {why}, and the adapter so far in {adapter}; {start}"
        unsaved = self._save_now()
        adapter = self._write_adapter(unsaved)
        if unsaved:
            raise CheckpointNotWritten(f"{unsaved}. The adapter so far was written to {adapter}")
        go_on = self.again(resume_from_checkpoint="auto")
        return f"saved {self.checkpoint}, and the adapter so far in {adapter}; go on with: {go_on}"

    def save_best(self, best: Best) -> str | None:
        """Write the adapter as it is now, and what it was measured at, to best/. Returns why it was not, on all ranks.

        best.json is there only beside the adapter that it tells of.
        """
        folder = Path(self.config.output_dir, BEST_FOLDER)
        if error := first_error(self.world, _error_of(partial(self._try_best, folder, best))):
            return f"the adapter of step {best.step}, the best so far, was not written: {error}"
        return None

    def _try_best(self, folder: Path, best: Best) -> None:
        if self.world.is_main:
            with suppress(OSError):  # the others wait for this rank to gather
                (folder / BEST_FILE).unlink(missing_ok=True)
        self._try_adapter(folder)
        if self.world.is_main:
            write_json(folder / BEST_FILE, {"measure": best.measure, "value": best.value, "step": best.step})

    def describe(self) -> None:
        """Write the cards of adapter/ and best/ anew, once the last evaluation is done."""
        best = Best.of(self.setup.progress, self.config.save_best)
        steps = {ADAPTER: self.setup.progress.step} | ({BEST_FOLDER: best.step} if best else {})
        for name, step in steps.items():
            if self.world.is_main and Path(self.config.output_dir, name).is_dir():
                write_card(self.config, Path(self.config.output_dir, name), step)

    def after_divergence(self) -> str:
        """What happened to a run that has diverged, and the command that goes on."""
        self.writer.wait()  # what is being written may be what the advice is to go back to
        self.world.barrier()  # each rank has written down its bad rows
        return found_by_main(self.world, lambda: advice(self.config, self.setup.progress, self.again))

    @contextmanager
    def displacement_told(self) -> Iterator[None]:
        """Say of the output folder's disappearance what is lost with it, and the command that goes on.

        Raises:
            Displaced: in the place of one without these words.
        """
        try:
            yield
        except Displaced as moved:
            raise Displaced(
                f"{moved}. The run stops at step {self.setup.progress.step}: the steps since its last checkpoint are "
                f"lost, and with the folder what was in it. If it was moved, move it back to {self.config.output_dir} "
                f"and go on with: {self.again(resume_from_checkpoint='auto')}"
            ) from None

    def _blind_rank(self) -> int | None:
        """A rank that does not see the main one's files. With ``--save-steps 0`` nobody has looked yet."""
        if self.config.save_steps:
            return None
        return rank_without_sight(Path(self.config.output_dir), self.world, _SEEN_WITHIN_S)

    def _save_now(self) -> str | None:
        """Have the checkpoint of the last complete step on the disk. Returns why it is not, on all ranks."""
        if error := first_error(self.world, _error_of(self.writer.settle)):
            return error
        if found_by_main(self.world, self.checkpoint.is_dir):
            return None
        if refusal := self.save():
            return f"checkpoint {self.checkpoint} was not written: {refusal}"
        return first_error(self.world, _error_of(self.writer.wait))

    def _write_adapter(self, unsaved: str | None) -> Path:
        """The main rank writes. ``unsaved``: why there is no checkpoint of this step."""
        folder = Path(self.config.output_dir, ADAPTER)
        unwritten = first_error(self.world, _error_of(partial(self._try_adapter, folder)))
        if unwritten is not None:
            what_now = found_by_main(self.world, partial(_what_now, self.checkpoint, unsaved, self.again))
            raise NotWritten(f"{unwritten}. {what_now}")
        return folder

    def _try_adapter(self, folder: Path) -> None:
        initial = self.setup.progress.initial
        try:
            save_adapter(
                self.setup.model,
                self.setup.lora,
                folder,
                base_model=self.setup.base_model,
                revision=self.config.revision,
                metadata=base_metadata(self.setup.progress.base) | initial_metadata(initial),
                is_main=self.world.is_main,
            )
            if self.world.is_main:
                copy_initial(Path(self.config.output_dir), folder, initial)
                self.setup.tokenizer.copy_files(folder)
                write_card(self.config, folder, self.setup.progress.step)
        except OSError:
            with suppress(OSError):
                folder.rmdir()  # an empty one would look like a result
            raise


def _error_of(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except (OSError, CheckpointNotWritten) as error:
        return error
    return None


def _what_now(checkpoint: Path, unsaved: str | None, again: Again) -> str:
    if unsaved is not None or not checkpoint.is_dir():
        return f"No checkpoint holds the last step either{f': {unsaved}' if unsaved else ' (--save-steps 0)'}"
    go_on = again(resume_from_checkpoint="auto")
    return f"Checkpoint {checkpoint} holds all of the training; make room, and have the adapter written by: {go_on}"
