"""``python -m qsharded.train``: a checkpoint and a dataset in, a LoRA adapter out. Read :func:`run` from the top."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.train", " before its first step: nothing was trained, so nothing is lost")

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.adapter import trainable
from qsharded.checkpoint.background_writer import CheckpointNotWritten, CheckpointWriter
from qsharded.checkpoint.resume import Progress, checkpoint_folder
from qsharded.cli import command_line
from qsharded.cli.command import errors_named, join_world, run_as_process
from qsharded.cli.command_line import Again
from qsharded.config import TrainConfig, builtin_overrides, parse
from qsharded.data import Cursor, Step
from qsharded.distributed.fsdp import DamagedGather, World, stop_world
from qsharded.distributed.self_test import check_gather
from qsharded.models import CausalLM
from qsharded.models.generation import LogitsNotFinite
from qsharded.optim import PagedAdamW8bit, clipping_scale
from qsharded.optim.schedule import learning_rate
from qsharded.plan.dry_run import dry_run
from qsharded.training import evaluation, results, setup
from qsharded.training.determinism import use_deterministic_algorithms
from qsharded.training.divergence import SkippedTooOften, has_diverged, skipped_more_than_allowed
from qsharded.training.finished import AlreadyFinished
from qsharded.training.metrics import MetricsLog, TrainRow
from qsharded.training.rank_failures import one_cause
from qsharded.training.stopping import StopRequested
from qsharded.utils.durable_files import NotWritten
from qsharded.utils.seeds import derived_seed
from qsharded.utils.sharding import whole


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    argv = sys.argv[1:] if argv is None else argv
    config = parse(argv, TrainConfig, fill=_not_given)
    if config.dry_run:
        with errors_named(config.prog, World.alone(torch.device("cpu"))):
            raise SystemExit(dry_run(config))
    if config.deterministic:
        use_deterministic_algorithms()
    world = join_world(config.prog)
    with one_cause(config.prog, world):
        status = _prepare_and_run(config, world, argv)
    stop_world(world)  # not where an error is on its way: it could wait for ranks that wait for this one
    if status:
        raise SystemExit(status)


def _prepare_and_run(config: TrainConfig, world: World, argv: Sequence[str]) -> int:
    """The exit status of a run that came to its end, or was stopped by a signal."""
    try:
        with errors_named(config.prog, world, (ValueError, OSError, DamagedGather)):
            check_gather(world)
            parts = setup.prepare(config, world)
    except AlreadyFinished as end:
        if world.is_main:
            print(f"{config.prog}: {end}")
        return 0
    kinds = SkippedTooOften, CheckpointNotWritten, DamagedGather, LogitsNotFinite, OSError
    with errors_named(config.prog, world, kinds):
        return run(config, world, parts, partial(command_line.command, argv, world.size))


def _not_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """The built-in run's settings where no model is given; a plan reads no rows, so it asks for no dataset."""
    return ({"dataset": ""} if given.get("dry_run") else {}) | builtin_overrides(given)


def run(config: TrainConfig, world: World, parts: setup.Parts, again: Again) -> int:
    """Evaluate, train, evaluate again, write the adapter; or save what there is when a signal asks to stop.

    Returns the exit status: 0, or what a stopped run is to exit with.
    """
    metrics_file = Path(config.output_dir, "metrics.jsonl")
    with (
        MetricsLog(metrics_file, parts.total_steps, world.is_main, first_step=parts.progress.step) as log,
        CheckpointWriter(
            Path(config.output_dir), world, config.save_total_limit, partial(results.save_refusal, config, parts)
        ) as writer,
    ):
        for line in parts.summary + results.room_note(config, parts):
            log.message(line)
        if parts.progress.step == 0:
            _evaluate(config, world, parts, log, "before training")
        signals.note_from_now()
        try:
            train_steps(config, world, parts, log, writer)
        except StopRequested as stop:
            return _save_stopped(config, world, parts, log, writer, stop, again)
        except SkippedTooOften:
            advice = results.after_divergence(config, world, parts.progress, writer, again)
            raise SkippedTooOften(advice) from None
        adapter = results.write_results(config, world, parts, writer, again)
        log.message(f"adapter written to {adapter}")  # before what may still fail
        try:
            _evaluate(config, world, parts, log, "after training")
        except StopRequested as stop:
            log.message(f"stopped by {stop} during the last evaluation, which is left out; the training is finished")
    return 0


def _save_stopped(
    config: TrainConfig,
    world: World,
    parts: setup.Parts,
    log: MetricsLog,
    writer: CheckpointWriter,
    stop: StopRequested,
    again: Again,
) -> int:
    """Save what the last complete step has left, and say so. Every rank calls this; returns the exit status."""
    step = parts.progress.step
    if step == 0:
        log.message(f"stopped by {stop} in the first step: there is nothing to save yet")
        return 128 + stop.signal
    happened = f"stopped by {stop} after step {step} of {parts.total_steps}"
    try:
        saved = results.save_stopped(config, world, parts, writer, again)
    except (NotWritten, CheckpointNotWritten) as error:
        raise type(error)(f"{happened}; {error}") from error
    log.message(f"{happened}; {saved}")
    world.barrier()  # the main rank writes the longest, and torchrun ends all when one exits with another status
    return config.exit_code_when_stopped


def train_steps(
    config: TrainConfig, world: World, parts: setup.Parts, log: MetricsLog, writer: CheckpointWriter
) -> None:
    """Optimizer steps from where the run stands to its end.

    Raises:
        SkippedTooOften: the run has diverged.
        StopRequested: a signal asks to stop; the progress is that of the last complete step.
    """
    progress, window = parts.progress, Window(parts.progress)
    for step in parts.loader.steps(Cursor(progress.epoch, progress.row)):
        if progress.step >= parts.total_steps:
            break
        rate, start = _learning_rate(config, parts, progress.step), time.perf_counter()
        loss, grad_norm = _train_step(config, world, parts, step, rate)
        progress.step += 1
        progress.epoch, progress.row = step.cursor.epoch, step.cursor.row
        window.add(loss, step, time.perf_counter() - start)
        log.advance(progress.step)
        if progress.step % config.logging_steps == 0 or progress.step == parts.total_steps:
            log.train(window.close(progress, parts.epochs_done(), grad_norm, rate, world))
            if has_diverged(config, progress):
                raise SkippedTooOften(skipped_more_than_allowed(config, progress))
        _evaluate_and_save(config, world, parts, log, writer)


def _train_step(config: TrainConfig, world: World, parts: setup.Parts, step: Step, rate: float) -> tuple[float, float]:
    """One optimizer step; returns the loss a supervised token and the gradient's norm, both over all ranks."""
    if isinstance(parts.optimizer, PagedAdamW8bit):
        parts.optimizer.prefetch()  # hidden behind the passes
    loss_sum = accumulate_gradient(
        parts.model, step, world, seed=config.seed, step_number=parts.progress.step, before_each=parts.stopping.check
    )
    grad_norm = _apply_gradient(config, parts, rate)
    return evaluation.global_sum(loss_sum, world) / step.supervised_tokens, grad_norm


def accumulate_gradient(
    model: CausalLM,
    step: Step,
    world: World,
    *,
    seed: int,
    step_number: int,
    before_each: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Add the gradient of the mean loss over the supervised tokens of all ranks and micro-batches.

    What ``before_each``, called before each micro-batch, raises leaves the step unfinished.

    Returns this rank's sum of token losses, fp64.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for index, batch in enumerate(step.micro_batches):
        before_each()
        # A resumed run needs no generator state: dropout draws from what it is for.
        torch.manual_seed(derived_seed(seed, step_number, index, world.rank))
        loss = evaluation.batch_loss(model, batch.to(world.device))
        # FSDP2 averages the gradient over ranks, hence the world's size.
        (loss * (world.size / step.supervised_tokens)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _apply_gradient(config: TrainConfig, parts: setup.Parts, rate: float) -> float:
    """Clip and step, or skip where the gradient is not finite: the norm is global, so all ranks decide alike."""
    optimizer, parameters = parts.optimizer, [parameter for _, parameter in trainable(parts.model)]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    for group in optimizer.param_groups:
        group["lr"] = rate
    if isinstance(optimizer, PagedAdamW8bit):
        optimizer.step(grad_scale=clipping_scale(norm, config.max_grad_norm))  # skips by itself
    elif torch.isfinite(norm):
        if config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad()
    norm_value = norm.item()  # the first wait for the device, once the step is queued
    parts.progress.skipped_steps += not math.isfinite(norm_value)
    return norm_value


def _learning_rate(config: TrainConfig, parts: setup.Parts, step: int) -> float:
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_ratio * parts.total_steps)
    return learning_rate(
        step,
        peak=config.learning_rate,
        total_steps=parts.total_steps,
        warmup_steps=warmup,
        kind=config.lr_scheduler_type,
    )


class Window:
    """What happened since the last log line; it is part of the progress, so a resumed run logs the same figures."""

    def __init__(self, progress: Progress) -> None:
        self._sums = progress.window
        self._seconds, self._tokens = 0.0, 0

    def add(self, loss: float, step: Step, seconds: float) -> None:
        """Count a step that took so many seconds, with its loss a supervised token."""
        self._sums["loss"] = self._sums.get("loss", 0.0) + loss * step.supervised_tokens
        self._sums["supervised"] = self._sums.get("supervised", 0) + step.supervised_tokens
        self._tokens += step.tokens
        self._seconds += seconds

    def close(self, progress: Progress, epoch: float, grad_norm: float, rate: float, world: World) -> TrainRow:
        """The log line of this window; the next begins. The norm is the last step's, before clipping."""
        row = TrainRow(
            step=progress.step,
            epoch=epoch,
            loss=self._sums["loss"] / self._sums["supervised"],
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens_per_second=self._tokens / self._seconds,
            memory_gib=peak_memory_gib(world.device),
            skipped_steps=progress.skipped_steps,
        )
        self._sums.clear()
        self._seconds, self._tokens = 0.0, 0
        return row


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held: GPU memory reserved by PyTorch, or on the CPU its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _evaluate_and_save(
    config: TrainConfig, world: World, parts: setup.Parts, log: MetricsLog, writer: CheckpointWriter
) -> None:
    step = parts.progress.step
    if config.eval_steps and step % config.eval_steps == 0 and step < parts.total_steps:
        _log_validation(parts, world, log)
    writer.check(parts.progress)
    if config.save_steps and step % config.save_steps == 0 and step < parts.total_steps:  # that of the last: results
        _save(config, world, parts, writer)


def _save(config: TrainConfig, world: World, parts: setup.Parts, writer: CheckpointWriter) -> None:
    refusal = results.save(config, parts, writer)
    if refusal is not None and world.is_main:
        name = checkpoint_folder(Path(config.output_dir), parts.progress.step).name
        print(f"warning: checkpoint {name} is left out: {refusal}", file=sys.stderr)


def _evaluate(config: TrainConfig, world: World, parts: setup.Parts, log: MetricsLog, when: str) -> None:
    _log_validation(parts, world, log)
    if parts.prompts:
        _log_exact_match(parts, log, when)


def _log_validation(parts: setup.Parts, world: World, log: MetricsLog) -> None:
    if parts.eval_loader is not None:
        steps = islice(parts.eval_loader.steps(), parts.eval_loader.steps_in_epoch(0))
        values = evaluation.validation_loss(parts.model, parts.stopping.between(steps), world)
        log.evaluation(parts.progress.step, parts.epochs_done(), values)


def _log_exact_match(parts: setup.Parts, log: MetricsLog, when: str) -> None:
    result = evaluation.exact_match(parts.model, parts.tokenizer, parts.prompts, before_forward=parts.stopping.check)
    log.evaluation(parts.progress.step, parts.epochs_done(), {"exact_match": result.accuracy})
    log.message(f"exact match {when}: {result.accuracy:.1%} of {len(parts.prompts)} held-out prompts; samples:")
    for prompt, answer in list(zip(parts.prompts, result.answers, strict=True))[:4]:
        verdict = "right" if answer.strip() == prompt.answer.strip() else f"wrong, should be {prompt.answer!r}"
        log.message(f"  {prompt.text!r} -> {answer!r} ({verdict})")


if __name__ == "__main__":
    run_as_process(main)
