"""Ranks are killed under ``torchrun --max-restarts``: the run goes on by itself, to the bytes of an undisturbed one."""

import os
import signal
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from qsharded import train
from qsharded.checkpoint.files import write_json
from qsharded.config import TrainConfig
from qsharded.distributed.world import World
from qsharded.training.restarting import OWN_STORE, after_restart
from qsharded.training.run_record import RECORD_FILE, hub_commit
from qsharded.utils.process_identity import ProcessIdentity
from tests.checkpoint.test_background_writer import write
from tests.distributed.test_train import arguments
from tests.processes import Command

STEPS = 12
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "save_steps": 3, "eval_split": 0}
WEIGHTS = Path("adapter", "adapter_model.safetensors")


def torchrun(*args: object, restarts: int = 3) -> Command:
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return Command([*elastic, "--monitor-interval=0.1", *args], **{OWN_STORE: "1"})


def ranks_of(launcher: Command) -> list[int]:
    """The processes that torchrun has started, by their numbers."""
    task = f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children"
    found = [int(number) for number in Path(task).read_text().split()]
    return [pid for pid in found if b"qsharded.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill_one(launcher: Command, which: int) -> None:
    os.kill(ranks_of(launcher)[which], signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run = torchrun("-m", "qsharded.train", *arguments(model, dataset, output, **OPTIONS))
    assert run.end() == 0, run.lines
    return output


def test_a_killed_rank_costs_a_save_interval_at_most(
    model: Path, dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    # --overwrite-output-dir is for the first start: a restart that obeyed it would delete what it goes on from
    run = torchrun(
        *("-m", "qsharded.train", *arguments(model, dataset, tmp_path / "out", **OPTIONS), "--overwrite-output-dir")
    )
    run.wait_for("step  7/")
    kill_one(run, 1)
    assert run.end() == 0, run.lines
    assert any("started again by torchrun: going on from the newest checkpoint" in line for line in run.lines)
    assert any("resumed from" in line for line in run.lines)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments_end_in_the_undisturbed_bytes(
    model: Path, dataset: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    run = torchrun("-m", "qsharded.train", *arguments(model, dataset, tmp_path / "out", **OPTIONS))
    for _ in range(random.randint(1, 2)):
        time.sleep(random.uniform(0.5, 6))  # a run takes some 6 s, most of it before its first step
        if run.process.poll() is None and len(ranks_of(run)) == 2:
            kill_one(run, random.randrange(2))
    assert run.end() == 0, run.lines
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_run_that_was_refused_is_refused_again_after_a_restart(
    model: Path, dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """torchrun starts again what was refused: that makes the earlier run in the folder no part of this one."""
    before = (undisturbed / WEIGHTS).read_bytes()
    run = torchrun("-m", "qsharded.train", *arguments(model, dataset, undisturbed, **OPTIONS), restarts=1)
    assert run.end() != 0
    told = [line for line in run.lines if line.startswith("qsharded.train: error: ")]
    assert len(told) == 2, run.lines
    assert all("holds an earlier run (adapter)" in line for line in told)
    assert (undisturbed / WEIGHTS).read_bytes() == before


def test_without_a_store_of_its_own_a_run_that_may_restart_is_warned(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with patch.dict(os.environ, environment), redirect_stderr(StringIO()) as said:
        os.environ.pop(OWN_STORE, None)  # our launcher sets it, in the process that it is called in
        train.main(arguments(model, dataset, tmp_path / "out", max_steps=1, eval_split=0))
    assert f"start it with {OWN_STORE}=1" in said.getvalue()


def run_that(folder: Path, *, main: int, started_by: int) -> None:
    """The record of a run in ``folder``, whose main rank and torchrun are these processes."""
    write_json(
        folder / RECORD_FILE,
        {
            "main": ProcessIdentity.of(main).to_json(),
            "started_by": [ProcessIdentity.of(pid).to_json() for pid in (1, started_by)],
        },
    )


def config_after_restart(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> TrainConfig:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    config = TrainConfig(model="m", dataset="d", output_dir=str(folder), **options)
    return after_restart(config, World.single_process(torch.device("cpu")))


def test_a_restart_goes_on_from_its_own_checkpoints_whatever_the_first_start_was_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_that(tmp_path, main=1, started_by=os.getppid())
    options = {"overwrite_output_dir": True, "resume_from_checkpoint": "elsewhere"}
    found = config_after_restart(tmp_path, monkeypatch, **options)
    assert (found.resume_from_checkpoint, found.overwrite_output_dir) == ("elsewhere", True)
    write(tmp_path, 3)
    found = config_after_restart(tmp_path, monkeypatch, **options)
    assert (found.resume_from_checkpoint, found.overwrite_output_dir) == ("auto", False)


@pytest.mark.parametrize(
    ("main", "started_by"), [(os.getpid(), os.getppid()), (1, 1)], ids=["the same process", "another torchrun"]
)
def test_what_another_start_left_is_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: int, started_by: int
) -> None:
    write(tmp_path, 3)
    run_that(tmp_path, main=main, started_by=started_by)
    assert config_after_restart(tmp_path, monkeypatch).resume_from_checkpoint is None


def test_the_record_pins_what_came_from_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f1e2d"
    assert hub_commit(snapshot) == hub_commit(snapshot / "data" / "rows.jsonl") == "0f1e2d"
    assert hub_commit(tmp_path) is None
