"""Signals to real ranks, and ranks that fail alone: what is saved, who says what, and how each one ends."""

import contextlib
import io
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import train
from qsharded.training import results
from qsharded.training.metrics import MetricsLog
from qsharded.utils import signals
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import arguments, assert_same_file, losses
from tests.processes import Command, script, start_ranks

OPTIONS = {"max_steps": 6, "optim": "adamw"}


# A signal in the fourth step, in the first of its two micro-batches; the third has one.
STOP_MID_STEP = """
import os, signal, sys, time
from qsharded.utils import signals
signals.take_over("qsharded.train", " before its first step")
from qsharded import train
from qsharded.cli.command import run_as_process
from qsharded.training import objective

loss, calls = objective.batch_loss, 0

def counted(model, batch):
    global calls
    calls += model.training
    if calls == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        while not signals.noted():
            time.sleep(0.01)
    return loss(model, batch)

objective.batch_loss = counted
run_as_process(train.main)
"""


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_to_the_same_bytes(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    whole, stopped = (arguments(model, dataset, tmp_path / name, **OPTIONS) for name in ("whole", "stopped"))
    ranks = start_ranks([script(tmp_path, STOP_MID_STEP), *stopped, "--exit-code-when-stopped=75", "--deterministic"])
    assert [rank.end() for rank in ranks] == [75, 75], [rank.lines for rank in ranks]
    said = [line for line in ranks[0].lines if "stopped by SIGTERM" in line]
    assert ranks[1].lines == []
    assert said == ranks[0].lines[-1:]
    assert f"after step 3 of 6; saved {tmp_path}/stopped/checkpoints/step-000003, and the adapter so far" in said[0]
    assert (tmp_path / "stopped" / "adapter" / "adapter_model.safetensors").is_file()

    command = shlex.split(said[0].split("go on with: ")[1])
    assert command[-3:] == ["--deterministic", "--resume-from-checkpoint", "auto"]
    run_ranks(train.main, 2, command[command.index("--model") :])
    run_ranks(train.main, 2, [*whole, "--deterministic"])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_same_file(tmp_path / "whole" / "adapter", tmp_path / "stopped" / "adapter")


def test_torchrun_hands_its_signal_on_and_the_line_has_its_command(model: Path, dataset: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "qsharded.train"]
    options = arguments(model, dataset, tmp_path / "out", max_steps=5000, exit_code_when_stopped=7)
    run = Command([*launcher, *options])
    run.wait_for("step    2/5000")
    run.signal(signal.SIGINT)
    run.end()
    (said,) = [line for line in run.lines if "stopped by" in line]
    assert "stopped by SIGINT after step" in said
    command = shlex.split(said.split("go on with: ")[1])
    assert command[1:] == [*launcher, *options, "--resume-from-checkpoint", "auto"]


# Rank 1 is signalled while it loads; rank 0 waits for it.
SIGNAL_WHILE_LOADING = """
import os, signal, time
from qsharded.utils import signals
signals.take_over("qsharded.train", " before its first step")
from qsharded import train
from qsharded.cli.command import run_as_process
from qsharded.training import setup

def load(config, world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
    world.barrier()

setup.prepare = load
run_as_process(train.main)
"""


def test_a_signal_to_one_rank_while_loading_ends_all_with_one_line(model: Path, dataset: Path, tmp_path: Path) -> None:
    ranks = start_ranks([script(tmp_path, SIGNAL_WHILE_LOADING), *arguments(model, dataset, tmp_path / "out")])
    assert [rank.end() for rank in ranks] == [143, 143]
    assert [rank.lines for rank in ranks] == [["qsharded.train: stopped by SIGTERM before its first step"], []]


# The main rank sits in what no error ends, as NCCL's collectives are, while another fails.
FAIL_ALONE = """
import os, sys, time
from qsharded.utils import signals
signals.take_over("qsharded.train")
from qsharded import train
from qsharded.cli.command import run_as_process

from qsharded.training.trainer import Trainer

step = Trainer.train_step

def failing(run, *rest):
    if run.setup.progress.step == 2:
        if run.world.rank == 1:
            raise {error}
        {meanwhile}
    return step(run, *rest)

Trainer.train_step = failing
run_as_process(train.main)
"""


@pytest.mark.parametrize("meanwhile", ["pass  # in a collective, which fails", "time.sleep(1000)  # in NCCL"])
def test_a_rank_that_fails_alone_ends_all_and_its_cause_is_the_only_one(
    model: Path, dataset: Path, tmp_path: Path, meanwhile: str
) -> None:
    source = FAIL_ALONE.format(error="RuntimeError('CUDA out of memory')", meanwhile=meanwhile)
    ranks = start_ranks([script(tmp_path, source), *arguments(model, dataset, tmp_path / "out", **OPTIONS)])
    assert [rank.end() for rank in ranks] == [1, 1]
    assert [line for line in ranks[1].lines if line.startswith("RuntimeError")] == ["RuntimeError: CUDA out of memory"]
    assert ranks[0].lines[-1].startswith("step 2/6 loss"), ranks[0].lines


def test_a_rank_that_is_killed_is_told_of_in_one_line(model: Path, dataset: Path, tmp_path: Path) -> None:
    source = FAIL_ALONE.format(error="SystemExit(os.kill(os.getpid(), 9))", meanwhile="pass")
    ranks = start_ranks([script(tmp_path, source), *arguments(model, dataset, tmp_path / "out", **OPTIONS)])
    assert [rank.end() for rank in ranks] == [1, -9]
    assert ranks[0].lines[-2].startswith("step 2/6 loss"), ranks[0].lines
    assert ranks[0].lines[-1].startswith("qsharded.train: error (rank 0): another rank ended")


def run_on_own_disk(model: Path, dataset: Path, folder: Path) -> str:
    """Train until the first step is done, each rank in a folder of its own; returns what was printed."""
    advance, own = MetricsLog.advance, folder / str(torch.distributed.get_rank())

    def stopping(log: Any, step: int) -> None:
        signals._listener.noted = signal.SIGTERM
        advance(log, step)

    MetricsLog.advance, results._SEEN_WITHIN_S = stopping, 0.2
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(arguments(model, dataset, own, max_steps=3, save_steps=0))
    return printed.getvalue()


def test_nodes_that_do_not_share_the_output_save_the_adapter_and_say_why_no_checkpoint(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    printed = run_ranks(run_on_own_disk, 2, model, dataset, tmp_path)[0]
    adapter = tmp_path / "0" / "adapter"
    assert "saved no checkpoint, as rank 1 does not see what rank 0 writes to --output-dir" in printed
    assert f"start from it with --adapter {adapter}\n" in printed
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "0" / "checkpoints").exists()
