"""``python -m qsharded.train``: a checkpoint and a dataset in, a LoRA adapter out. Read :func:`run` from the top."""

from qsharded import signals

if __name__ == "__main__":
    signals.take_over("qsharded.train", " before its first step: nothing was trained, so nothing is lost")

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qsharded import assembly, evaluation
from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.base import base_metadata
from qsharded.checkpoint.training import Progress, checkpoint_folder
from qsharded.checkpoint.writer import CheckpointNotWritten, CheckpointWriter
from qsharded.commands import errors_named, join_world, run_as_process
from qsharded.config import TrainConfig, builtin_overrides, parse
from qsharded.data import Cursor, Step
from qsharded.determinism import use_deterministic_algorithms
from qsharded.failures import one_cause
from qsharded.finished import AlreadyFinished, mark_finished
from qsharded.gather_check import check_gather
from qsharded.metrics import MetricsLog, TrainRow
from qsharded.models import CausalLM
from qsharded.models.generation import LogitsNotFinite
from qsharded.optim import PagedAdamW8bit, clipping_scale
from qsharded.optim.schedule import learning_rate
from qsharded.output import rank_without_sight
from qsharded.parallel import DamagedGather, World, stop_world
from qsharded.plan.dry_run import dry_run
from qsharded.restart import command_to_go_on
from qsharded.seeds import derived_seed
from qsharded.shards import whole
from qsharded.stopping import StopRequested

_SEEN_WITHIN_S = 5.0  # of the 25 s in which a stopped run is to be saved


class SkippedTooOften(RuntimeError):
    """More steps had a gradient that is not finite than ``--max-skipped-steps`` allows."""


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
            parts = assembly.prepare(config, world)
    except AlreadyFinished as end:
        if world.is_main:
            print(f"{config.prog}: {end}")
        return 0
    kinds = SkippedTooOften, CheckpointNotWritten, DamagedGather, LogitsNotFinite, OSError
    with errors_named(config.prog, world, kinds):
        return run(config, world, parts, lambda: command_to_go_on(argv))


def _not_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """The built-in run's settings where no model is given; a plan reads no rows, so it asks for no dataset."""
    return ({"dataset": ""} if given.get("dry_run") else {}) | builtin_overrides(given)


def run(config: TrainConfig, world: World, parts: assembly.Parts, how_to_go_on: Callable[[], str]) -> int:
    """Evaluate, train, evaluate again, write the adapter; or save what there is when a signal asks to stop.

    Returns the exit status: 0, or what a stopped run is to exit with.
    """
    metrics_file = Path(config.output_dir, "metrics.jsonl")
    with (
        MetricsLog(metrics_file, parts.total_steps, world.is_main, first_step=parts.progress.step) as log,
        CheckpointWriter(Path(config.output_dir), world, config.save_total_limit) as writer,
    ):
        for line in parts.summary:
            log.message(line)
        if parts.progress.step == 0:
            _evaluate(config, world, parts, log, "before training")
        signals.note_from_now()
        try:
            train_steps(config, world, parts, log, writer)
        except StopRequested as stop:
            return _save_stopped(config, world, parts, log, writer, stop, how_to_go_on)
        adapter = _write_adapter(config, world, parts)
        log.message(f"adapter written to {adapter}")  # before what may still fail
        if world.is_main:
            mark_finished(config, parts.progress)
        try:
            _evaluate(config, world, parts, log, "after training")
        except StopRequested as stop:
            log.message(f"stopped by {stop} during the last evaluation, which is left out; the training is finished")
    return 0


def _write_adapter(config: TrainConfig, world: World, parts: assembly.Parts) -> Path:
    """Every rank calls this; the main one writes."""
    adapter = Path(config.output_dir, "adapter")
    save_adapter(
        parts.model,
        parts.lora,
        adapter,
        base_model=parts.base_model,
        revision=config.revision,
        metadata=base_metadata(parts.progress.base),
        is_main=world.is_main,
    )
    if world.is_main:
        parts.tokenizer.copy_files(adapter)
    return adapter


def _save_stopped(
    config: TrainConfig,
    world: World,
    parts: assembly.Parts,
    log: MetricsLog,
    writer: CheckpointWriter,
    stop: StopRequested,
    how_to_go_on: Callable[[], str],
) -> int:
    """Save the last complete step, the adapter so far, and say so. Every rank calls this; returns the exit status."""
    step = parts.progress.step
    if step == 0:
        log.message(f"stopped by {stop} in the first step: there is nothing to save yet")
        return 128 + stop.signal
    why_none = _save_checkpoint_of_stop(config, world, parts, writer)
    adapter = _write_adapter(config, world, parts)
    checkpoint = f"no checkpoint, as {why_none}" if why_none else checkpoint_folder(Path(config.output_dir), step)
    on = f"start from it with --adapter {adapter}" if why_none else f"go on with: {how_to_go_on()}"
    log.message(
        f"stopped by {stop} after step {step} of {parts.total_steps}; saved {checkpoint}, and the adapter so far in "
        f"{adapter}; {on}"
    )
    world.barrier()  # the main rank writes the longest, and torchrun ends all when one exits with another status
    return config.exit_code_when_stopped


def _save_checkpoint_of_stop(config: TrainConfig, world: World, parts: assembly.Parts, writer: CheckpointWriter) -> str:
    """Have the checkpoint of this step on the disk; returns why it cannot be, or ""."""
    writer.wait()
    if parts.stopping.main_says(checkpoint_folder(Path(config.output_dir), parts.progress.step).is_dir()):
        return ""
    # with --save-steps 0 nobody has looked yet
    blind = None if config.save_steps else rank_without_sight(Path(config.output_dir), world, _SEEN_WITHIN_S)
    if blind is not None:
        return f"rank {blind} does not see what rank 0 writes to --output-dir"
    _save(config, parts, writer)
    writer.wait()
    return ""


def train_steps(
    config: TrainConfig, world: World, parts: assembly.Parts, log: MetricsLog, writer: CheckpointWriter
) -> None:
    """Optimizer steps from where the run stands to its end."""
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
            _refuse_divergence(config, progress)
        _evaluate_and_save(config, world, parts, log, writer)


def _train_step(
    config: TrainConfig, world: World, parts: assembly.Parts, step: Step, rate: float
) -> tuple[float, float]:
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


def _apply_gradient(config: TrainConfig, parts: assembly.Parts, rate: float) -> float:
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


def _learning_rate(config: TrainConfig, parts: assembly.Parts, step: int) -> float:
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


def _refuse_divergence(config: TrainConfig, progress: Progress) -> None:
    if progress.skipped_steps > config.max_skipped_steps:
        raise SkippedTooOften(
            f"{progress.skipped_steps} steps were skipped by step {progress.step} because their gradient was not "
            f"finite, --max-skipped-steps allows {config.max_skipped_steps}. Lower --learning-rate, or look for "
            "damaged rows in the dataset"
        )


def _evaluate_and_save(
    config: TrainConfig, world: World, parts: assembly.Parts, log: MetricsLog, writer: CheckpointWriter
) -> None:
    step = parts.progress.step
    if config.eval_steps and step % config.eval_steps == 0 and step < parts.total_steps:
        _log_validation(parts, world, log)
    writer.check()
    if config.save_steps and step % config.save_steps == 0:
        _save(config, parts, writer)


def _save(config: TrainConfig, parts: assembly.Parts, writer: CheckpointWriter) -> None:
    writer.save(
        parts.model,
        parts.lora,
        parts.optimizer,
        parts.progress,
        base_model=parts.base_model,
        revision=config.revision,
    )


def _evaluate(config: TrainConfig, world: World, parts: assembly.Parts, log: MetricsLog, when: str) -> None:
    _log_validation(parts, world, log)
    if parts.prompts:
        _log_exact_match(parts, log, when)


def _log_validation(parts: assembly.Parts, world: World, log: MetricsLog) -> None:
    if parts.eval_loader is not None:
        steps = islice(parts.eval_loader.steps(), parts.eval_loader.steps_in_epoch(0))
        values = evaluation.validation_loss(parts.model, parts.stopping.between(steps), world)
        log.evaluation(parts.progress.step, parts.epochs_done(), values)


def _log_exact_match(parts: assembly.Parts, log: MetricsLog, when: str) -> None:
    result = evaluation.exact_match(parts.model, parts.tokenizer, parts.prompts, before_forward=parts.stopping.check)
    log.evaluation(parts.progress.step, parts.epochs_done(), {"exact_match": result.accuracy})
    log.message(f"exact match {when}: {result.accuracy:.1%} of {len(parts.prompts)} held-out prompts; samples:")
    for prompt, answer in list(zip(parts.prompts, result.answers, strict=True))[:4]:
        verdict = "right" if answer.strip() == prompt.answer.strip() else f"wrong, should be {prompt.answer!r}"
        log.message(f"  {prompt.text!r} -> {answer!r} ({verdict})")


if __name__ == "__main__":
    run_as_process(main)
