"""``qsharded train``: who starts ranks, who does not, and how their end becomes the command's."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from qsharded.cli import launch
from tests.processes import ROOT, Command


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``train`` does in place of running anything."""
    actions: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "_run_here", lambda argv: actions.append(("here", *argv)))
    monkeypatch.setattr(launch, "start_ranks", lambda ranks, command: actions.append((ranks, *command[2:])) or 3)
    monkeypatch.setattr(os, "execv", lambda _, words: actions.append(("replaced", *words[1:])))
    monkeypatch.setattr(launch, "_gpus", lambda: 4)
    return actions


def leave(argv: list[str]) -> Any:
    with pytest.raises(SystemExit) as end:
        launch.train(argv)
    return end.value.code


def test_a_rank_for_each_gpu_and_their_exit_status(done: list[Any]) -> None:
    assert leave(["--seed", "1"]) == 3
    assert done == [(4, "-m", "qsharded.train", "--seed", "1")]


def test_as_many_ranks_as_are_asked_for(done: list[Any]) -> None:
    leave(["--ranks", "2"])
    assert done == [(2, "-m", "qsharded.train", "--ranks", "2")]


def test_one_rank_takes_this_process(done: list[Any]) -> None:
    leave(["--ranks", "1"])
    assert done[0] == ("replaced", "-m", "qsharded.train", "--ranks", "1")


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_under_torchrun_and_slurm_nothing_is_started(done: list[Any], monkeypatch: Any, name: str) -> None:
    monkeypatch.setenv(name, "0")
    launch.train(["--seed", "1"])
    assert done == [("here", "--seed", "1")]


def test_torchruns_ranks_start_none_whatever_is_asked(done: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    launch.train(["--ranks", "2"])
    assert done == [("here", "--ranks", "2")]


def test_a_task_of_slurm_starts_ranks_that_are_asked_for(done: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    leave(["--ranks", "2"])
    assert done == [(2, "-m", "qsharded.train", "--ranks", "2")]


def test_a_plan_starts_none(done: list[Any]) -> None:
    launch.train(["--dry-run"])
    assert done == [("here", "--dry-run")]


def test_a_mistake_starts_none_and_is_told_once(done: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["--ranks", "0"]) == 2
    assert done == []
    assert capsys.readouterr().err.startswith("qsharded.train: error: --ranks must be at least 1, got 0\n")


def test_tasks_of_an_srun_are_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_NODELIST": "node[1-2]", "JOB_ID": "70001"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    launch.join_slurm(environment)
    found = {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    ranks = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert found == ranks | {"MASTER_ADDR": "node1", "MASTER_PORT": "30001"}


def test_one_task_of_an_srun_is_a_run_by_itself() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    launch.join_slurm(environment)
    assert "RANK" not in environment


LAUNCHER = "import sys\nfrom qsharded.cli.launch import start_ranks\nsys.exit(start_ranks(2, sys.argv[1:]))\n"
RANK = "import os, signal, sys, time\nrank = os.environ['RANK']\n"


def launched(tmp_path: Path, text: str) -> Command:
    """Two ranks that run ``text``, and their launcher, as processes."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK + text)
    return Command([tmp_path / "launcher.py", sys.executable, "-u", tmp_path / "rank.py"], PYTHONPATH=str(ROOT))


def test_ranks_know_each_other_and_share_the_cores(tmp_path: Path) -> None:
    command = launched(tmp_path, "print(rank, os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])\n")
    assert command.end() == 0
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(command.lines) == [f"0 2 {threads}", f"1 2 {threads}"]


def test_a_failed_rank_has_the_only_line_and_the_exit_status(tmp_path: Path) -> None:
    text = "if rank == '1':\n    print('its reason')\n    sys.exit(7)\ntime.sleep(60)\n"
    command = launched(tmp_path, text)
    assert command.end() == 7
    assert command.lines == ["its reason"]


def test_a_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    text = "if rank == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"
    command = launched(tmp_path, text)
    assert command.end() == 128 + signal.SIGKILL
    [line] = command.lines
    assert line == "qsharded.train: error: rank 1 was killed with SIGKILL"


def test_the_kernels_kill_is_told_from_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch._status(2, -9, kills=1) == 137
    assert "rank 2 was killed with SIGKILL by the kernel, for lack of host memory" in capsys.readouterr().err


def test_a_signal_is_passed_on_and_is_the_exit_status(tmp_path: Path) -> None:
    # one write a line: both ranks have the same pipe, and print takes several
    text = "signal.signal(signal.SIGUSR1, lambda *_: (os.write(1, b'told\\n'), sys.exit(0)))\n"
    text += "os.write(1, f'up {rank}\\n'.encode())\ntime.sleep(60)\n"
    command = launched(tmp_path, text)
    command.wait_for("up 0")
    command.wait_for("up 1")
    command.signal(signal.SIGUSR1)
    assert command.end() == 128 + signal.SIGUSR1
    assert sorted(command.lines) == ["told", "told", "up 0", "up 1"]


def test_a_mistake_that_all_ranks_find_is_one_line(tmp_path: Path) -> None:
    absent = tmp_path / "rows.jsonl"
    command = Command(["-m", "qsharded", "train", "--ranks", 2, "--dataset", absent, "--output-dir", tmp_path / "out"])
    assert command.end() == 1
    [line] = command.lines
    assert line.startswith(f"qsharded.train: error: {absent} is no file")
