"""A run from its set-up to its end. Read :meth:`Trainer.run` from the top."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from qsharded.checkpoint.background_writer import CheckpointNotWritten, CheckpointWriter
from qsharded.cli.command_line import Again
from qsharded.config import TrainConfig
from qsharded.data import Cursor, Step
from qsharded.data.ahead import one_ahead
from qsharded.distributed.world import World
from qsharded.optim.schedule import learning_rate
from qsharded.report.run_files import METRICS_FILE, REPORT_FILE
from qsharded.training import results
from qsharded.training.bad_batches import BadBatches
from qsharded.training.balanced import objective_of
from qsharded.training.divergence import SkippedTooOften, has_diverged, skipped_more_than_allowed
from qsharded.training.evaluating import Evaluations
from qsharded.training.gradient import accumulate_gradient, apply_gradient, was_skipped
from qsharded.training.host_work import little_host_work
from qsharded.training.log_window import LogWindow
from qsharded.training.metrics import MetricsLog
from qsharded.training.model_cards import card_text
from qsharded.training.objective import SUPERVISED, Objective
from qsharded.training.profiling import profiled
from qsharded.training.run_report import RunReport
from qsharded.training.running_step import RunningStep
from qsharded.training.setup import TrainingSetup
from qsharded.training.stopping import StopRequested
from qsharded.training.trackers import Trackers
from qsharded.utils import heartbeat, signals
from qsharded.utils.durable_files import NotWritten


@dataclass(frozen=True)
class Trainer:
    """Evaluates, trains, saves and logs. Every rank has one, and all call the same methods.

    Attributes:
        again: gives the command that goes on with this run, its options changed.
        objective: what the steps make small; the evaluations measure the trained tokens' loss whatever it is.
    """

    config: TrainConfig
    world: World
    setup: TrainingSetup
    log: MetricsLog
    writer: CheckpointWriter
    again: Again
    report: RunReport
    objective: Objective = SUPERVISED

    @classmethod
    @contextmanager
    def opened(
        cls, config: TrainConfig, world: World, setup: TrainingSetup, again: Again, **others: Any
    ) -> Iterator[Self]:
        """One whose log and checkpoint writer are in ``--output-dir``, and closed at the end."""
        folder, refusal = Path(config.output_dir), partial(results.save_refusal, config, setup)
        first = setup.progress.step
        with (
            RunReport(folder, world.is_main, config.report_png) as report,
            Trackers(config, world.is_main, first) as trackers,
            MetricsLog(
                folder / METRICS_FILE, setup.total_steps, world.is_main, first_step=first, trackers=trackers
            ) as log,
            CheckpointWriter(folder, world, config.save_total_limit, refusal, partial(card_text, config)) as writer,
        ):
            others = {"objective": objective_of(config, setup.model), **others}
            trainer = cls(config, world, setup, log, writer, again, report, **others)
            with trainer.results.displacement_told():
                yield trainer

    @property
    def results(self) -> results.Results:
        """What writes the run's files."""
        return results.Results(self.config, self.world, self.setup, self.writer, self.again)

    @cached_property
    def evaluations(self) -> Evaluations:
        """What measures the model, and keeps the best."""
        return Evaluations(self.config, self.world, self.setup, self.log, self.results)

    @cached_property
    def bad_batches(self) -> BadBatches:
        """What writes down the rows of steps that are skipped."""
        return BadBatches(self.config, self.world.rank, self.setup.tokenizer)

    def run(self) -> int:
        """Evaluate, train, evaluate again, write the adapter; or save what there is when a signal asks to stop.

        Returns the exit status: 0, or what a stopped run is to exit with.
        """
        for line in self.setup.summary + results.room_note(self.config, self.setup):
            self.log.message(line)
        if self.setup.progress.step == 0:
            self.evaluations.before_training()
        signals.note_from_now()
        try:
            self.train()
        except StopRequested as stop:
            return self._save_stopped(stop)
        except SkippedTooOften:
            raise SkippedTooOften(self.results.after_divergence()) from None
        adapter = self.results.write()
        self.log.message(f"adapter written to {adapter}")  # before what may still fail
        try:
            self.evaluations.after_training()
        except StopRequested as stop:
            self.log.message(
                f"stopped by {stop} during the last evaluation, which is left out; the training is finished"
            )
        for line in [*self.evaluations.verdict(), *self.setup.late_notes()]:
            self.log.message(line)
        self.results.describe()
        report = Path(self.config.output_dir, REPORT_FILE)
        self.log.message(f"the run on one page: {report}")  # its end is added on leaving
        return 0

    def train(self) -> None:
        """Optimizer steps from where the run stands to its end.

        Raises:
            SkippedTooOften: the run has diverged.
            StopRequested: a signal asks to stop; the progress is that of the last complete step.
        """
        progress, window = self.setup.progress, LogWindow(self.setup.progress)
        unread: RunningStep | None = None  # the device may be at work on it
        with little_host_work(), profiled(self.config, self.world, progress.step) as profiler:
            try:
                for step in one_ahead(self._steps()):
                    if progress.step >= self.setup.total_steps or self.evaluations.judge.is_patience_out():
                        break
                    heartbeat.beat(f"step {progress.step + 1}")
                    running = self.train_step(step, self._learning_rate())
                    profiler.step()
                    read_before, unread = unread, running
                    if read_before is not None:
                        self._read(read_before, window)
                    self.log.advance(progress.step)
                    self.report.has_steps()
                    if running.is_done() or self._is_looked_at():
                        unread = None
                        self._read(running, window)
                    self._evaluate_and_save(window)
            except BaseException as error:
                if unread is not None and (isinstance(error, StopRequested) or unread.is_done()):
                    self._read(unread, window)
                raise

    def _steps(self) -> Iterator[Step]:
        """From where the run stands on; in page-locked memory for a GPU."""
        progress = self.setup.progress
        steps = self.setup.loader.steps(Cursor(progress.epoch, progress.row))
        return map(Step.pin_memory, steps) if self.world.device.type == "cuda" else steps

    def _is_looked_at(self) -> bool:
        """Whether something after this step needs its figures, or to find it done."""
        config = self.config
        is_last = self.setup.progress.step >= self.setup.total_steps
        return is_last or any(map(self._is_due, (config.eval_steps, config.sample_steps, config.save_steps)))

    def _is_due(self, every: int | None) -> bool:
        """Whether what comes every so many steps comes now; what follows the last step is not the loop's."""
        step = self.setup.progress.step
        return step < self.setup.total_steps and bool(every and step % every == 0)

    def train_step(self, step: Step, rate: float) -> RunningStep:
        """One optimizer step, which the device may still be at work on."""
        setup, progress = self.setup, self.setup.progress
        setup.optimizer.prefetch()  # hidden behind the passes
        sums = accumulate_gradient(
            setup.model,
            step,
            self.world,
            seed=self.config.seed,
            step_number=progress.step,
            objective=self.objective,
            before_each=setup.stopping.check,
        )
        self.bad_batches.remember(progress.step + 1, step, sums.loss)
        grad_norm = apply_gradient(setup.model, setup.optimizer, rate, self.config.max_grad_norm)
        progress.step += 1
        progress.epoch, progress.row = step.cursor.epoch, step.cursor.row
        return RunningStep.queued(
            sums,
            grad_norm,
            self.world,
            number=progress.step,
            epoch=setup.epochs_done(),
            rate=rate,
            tokens=step.tokens,
            count=self.objective.count(step),
        )

    def _read(self, running: RunningStep, window: LogWindow) -> None:
        """Count a step, and log it where its turn has come.

        Raises:
            SkippedTooOften: the run has diverged.
            CheckpointNotWritten: one that was being written meanwhile.
        """
        result, progress = running.result(), self.setup.progress
        progress.skipped_steps += was_skipped(result.grad_norm)
        if was_skipped(result.grad_norm):
            self.bad_batches.write(running.number)
        window.add(result, running.tokens)
        if running.number % self.config.logging_steps == 0 or running.number == self.setup.total_steps:
            self.log.train(window.close(running, result.grad_norm, progress.skipped_steps, self.world.device))
            if has_diverged(self.config, progress):
                raise SkippedTooOften(skipped_more_than_allowed(self.config, progress))
        self.writer.check(running.number - progress.skipped_steps)

    def _learning_rate(self) -> float:
        """Of the next step."""
        config, total = self.config, self.setup.total_steps
        warmup = config.warmup_steps
        return learning_rate(
            self.setup.progress.step,
            peak=config.learning_rate,
            total_steps=total,
            warmup_steps=round(config.warmup_ratio * total) if warmup is None else warmup,
            kind=config.lr_scheduler_type,
        )

    def _evaluate_and_save(self, window: LogWindow) -> None:
        if self._is_due(self.config.eval_steps):
            self.evaluations.between_steps()
            window.restart_clock()
        if self._is_due(self.config.sample_steps):
            self.evaluations.sample()
            window.restart_clock()
        if self._is_due(self.config.save_steps):
            self._save()
            window.restart_clock()

    def _save(self) -> None:
        self.log.refuse_displaced()
        self.report.write_soon()
        refusal = self.results.save()
        if refusal is not None and self.world.is_main:
            name = self.results.checkpoint.name
            print(f"warning: checkpoint {name} is left out: {refusal}", file=sys.stderr)

    def _save_stopped(self, stop: StopRequested) -> int:
        """Save what the last complete step has left, and say so; returns the exit status."""
        step = self.setup.progress.step
        self.log.refuse_displaced()
        if step == 0:
            self.log.message(f"stopped by {stop} in the first step: there is nothing to save yet")
            return 128 + stop.signal
        happened = f"stopped by {stop} after step {step} of {self.setup.total_steps}"
        try:
            saved = self.results.save_stopped()
        except (NotWritten, CheckpointNotWritten) as error:
            raise type(error)(f"{happened}; {error}") from error
        self.log.message(f"{happened}; {saved}")
        self.world.barrier()  # the main rank writes longest, and torchrun ends all when one exits with another status
        return self.config.exit_code_when_stopped
