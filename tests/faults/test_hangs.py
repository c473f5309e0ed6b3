"""Ranks that hang: who says what, and when the run ends."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded.config import TrainConfig
from qsharded.distributed.world import World
from qsharded.training.hang_report import RankStatus, said_of
from qsharded.training.watchdog import watched
from qsharded.utils import heartbeat
from qsharded.utils.exit_codes import HANG
from tests.distributed.test_train import arguments
from tests.processes import start_ranks

MINUTES = 0.05
OPTIONS: dict[str, Any] = {"max_steps": 500, "eval_split": 0, "hang_timeout": MINUTES}


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["the store's host", "another"])
def test_a_stopped_rank_ends_the_run_and_is_named(model: Path, dataset: Path, tmp_path: Path, stopped: int) -> None:
    ranks = start_ranks(["-m", "qsharded.train", *arguments(model, dataset, tmp_path / "out", **OPTIONS)])
    ranks[0].wait_for("step 100/")  # by then each has told the others of a step
    ranks[stopped].signal(signal.SIGSTOP)
    try:
        assert ranks[1 - stopped].end() == HANG, ranks[1 - stopped].lines
    finally:
        ranks[stopped].process.kill()
    said = [line for line in ranks[1 - stopped].lines if "no progress of any rank for 0.05 minutes" in line]
    assert len(said) == 1
    assert f"rank {1 - stopped} waits, step " in said[0]
    accused = "rank 1 does not answer (last: step " if stopped else "the store that the ranks share does not answer"
    assert accused in said[0]
    stacks = (tmp_path / "out" / "hang" / f"rank-{1 - stopped:05d}.txt").read_text()
    assert "trainer.py" in stacks


@contextmanager
def leaving(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The exit statuses with which a watchdog in this process would have left."""
    left: list[int] = []

    def leave(status: int) -> None:
        left.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    yield left


def watching(tmp_path: Path, minutes: float) -> Any:
    config = TrainConfig(model="m", dataset="d", output_dir=str(tmp_path), hang_timeout=minutes)
    return watched(config, World.single_process(torch.device("cpu")))


@pytest.mark.parametrize("how", ["beats", "outside", "off"])
def test_a_process_that_goes_on_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    heartbeat.beat("testing")
    outside = heartbeat.working_outside("downloading") if how == "outside" else nullcontext()
    with leaving(monkeypatch) as left, watching(tmp_path, 0 if how == "off" else 0.01), outside:
        for _ in range(15):
            time.sleep(0.1)
            if how == "beats":
                heartbeat.beat("reading weights")
    assert left == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the way out of its thread
def test_a_process_that_does_not_leaves_its_stacks_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    heartbeat.beat("reading weights")
    with leaving(monkeypatch) as left, watching(tmp_path, 0.005):
        while not left:  # pytest's time-out ends this where nothing does
            time.sleep(0.01)
    assert left == [HANG]
    said = capfd.readouterr().err
    assert "no progress of any rank for 0.005 minutes (--hang-timeout): rank 0 waits, reading weights, in " in said
    assert "test_hangs.py" in said
    assert "test_hangs.py" in (tmp_path / "hang" / "rank-00000.txt").read_text()


def test_the_line_names_who_is_behind_and_who_is_silent() -> None:
    def status(meetings: int) -> RankStatus:
        return RankStatus(1, 9, meetings, f"step {meetings}", "a.py:1 f")

    said = said_of({0: status(7), 1: status(6), 2: status(5)}, {2, 3})
    assert said == (
        "rank 2 does not answer (last: step 5); rank 3 does not answer (last: nothing); "
        "rank 1 is behind, step 6, in a.py:1 f; rank 0 waits, step 7, in a.py:1 f"
    )
    many = said_of({rank: status(7) for rank in range(20)}, {19})
    assert many.startswith("rank 19 does not answer")
    assert many.endswith("; and 12 more")
