"""``python -m qsharded.train``: a checkpoint and a dataset in, a LoRA adapter out."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.train", " before its first step: nothing was trained, so nothing is lost")

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from qsharded.checkpoint.background_writer import CheckpointNotWritten
from qsharded.cli import command_line
from qsharded.cli.command import errors_named, join_world, run_as_process
from qsharded.config import TrainConfig, parse_train
from qsharded.distributed.exact_all_gather import DamagedGather
from qsharded.distributed.self_test import check_gather
from qsharded.distributed.world import World, stop_world
from qsharded.models.config_spellings import ignoring
from qsharded.models.generation import LogitsNotFinite
from qsharded.plan.dry_run import dry_run
from qsharded.training import setup
from qsharded.training.determinism import use_deterministic_algorithms
from qsharded.training.divergence import SkippedTooOften
from qsharded.training.finished import AlreadyFinished
from qsharded.training.memory_errors import memory_errors_end, memory_errors_explained
from qsharded.training.output_lock import output_locked
from qsharded.training.rank_failures import one_cause
from qsharded.training.restarting import after_restart
from qsharded.training.self_check import SelfCheckFailed
from qsharded.training.sharing import push_adapter, with_repository
from qsharded.training.trainer import Trainer
from qsharded.training.watchdog import collective_timeout, watched

_REFUSALS = ValueError, OSError, DamagedGather, SelfCheckFailed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    argv = sys.argv[1:] if argv is None else argv
    config = parse_train(argv)
    if config.dry_run:
        ignored = ignoring(config.ignore_config_key)
        with errors_named(config.prog, World.single_process(torch.device("cpu"))), ignored:
            raise SystemExit(dry_run(config))
    if config.deterministic:
        use_deterministic_algorithms()
    world = join_world(config.prog, collective_timeout(config))
    with memory_errors_end(config.prog, world), one_cause(config.prog, world), ExitStack() as held:
        held.enter_context(ignoring(config.ignore_config_key))
        status = _prepare_and_run(config, world, argv, held)
    stop_world(world)  # not where an error is on its way: it could wait for ranks that wait for this one
    if status:
        raise SystemExit(status)


def _prepare_and_run(config: TrainConfig, world: World, argv: Sequence[str], held: ExitStack) -> int:
    """The exit status of a run that came to its end, or was stopped by a signal. ``held``: its lock, to be released."""
    try:
        with memory_errors_explained(config, world), errors_named(config.prog, world, _REFUSALS):
            check_gather(world)
            held.enter_context(watched(config, world))
            held.enter_context(output_locked(Path(config.output_dir), world))
            config = with_repository(after_restart(config, world), world)
            prepared = setup.prepare(config, world)
    except AlreadyFinished as end:
        if world.is_main:
            print(f"{config.prog}: {end}")
        push_adapter(config, world)
        return 0
    kinds = SkippedTooOften, CheckpointNotWritten, DamagedGather, LogitsNotFinite, OSError
    again = partial(command_line.command, argv, world.size)
    explained = memory_errors_explained(config, world, prepared.model)
    with explained, errors_named(config.prog, world, kinds), Trainer.opened(config, world, prepared, again) as trainer:
        status = trainer.run()
    push_adapter(config, world)
    return status


if __name__ == "__main__":
    run_as_process(main)
