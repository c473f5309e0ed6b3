"""Our launcher: ranks that the kernel killed for memory, and ranks that someone else did."""

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from qsharded import launch
from qsharded.utils import hardware
from tests.distributed.test_train import arguments
from tests.processes import Command, script

KILLED = """
import os, signal, sys
from qsharded import launch
from qsharded.utils import hardware
counts = iter([5, 5 + int(sys.argv.pop(1))])
hardware.memory_kills = lambda: next(counts)
launch.main()
"""
KILLS_ITSELF = (
    "import os, signal\nassert os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] == '1'\nos.kill(os.getpid(), 9)\n"
)


def test_a_rank_that_was_killed_is_told_by_torchruns_report_and_ours(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(KILLS_ITSELF)
    run = Command([script(tmp_path, KILLED), 1, "--standalone", "--nproc-per-node=1", rank])
    assert run.end() == 1
    assert any("Signal 9 (SIGKILL)" in line for line in run.lines)
    assert any(
        line.startswith("qsharded.launch: rank 0 of this machine was killed with SIGKILL by the kernel")
        for line in run.lines
    )


def test_the_plans_host_figures_are_told(model: Path, dataset: Path, tmp_path: Path) -> None:
    words = ["--nproc-per-node", "3", "-m", "qsharded.train", *arguments(model, dataset, tmp_path)]
    said = launch._killed([2, 0], 1, words)
    assert said.startswith("qsharded.launch: rank 0, 2 of this machine was killed with SIGKILL by the kernel")
    assert "planned for a rank, GiB: interpreter 2.5, reading the checkpoint 2.0" in said
    assert "3 ranks share" in said


def test_another_sigkill_is_not_blamed_on_memory() -> None:
    assert "not by the kernel for lack of memory" in launch._killed([0], 0, [])


def test_the_kernels_counts_are_those_of_machine_and_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.events").write_text("low 0\noom 7\noom_kill 2\noom_group_kill 1\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 9\noom_kill 40\n")
    for name, path in (("_GROUPS", tmp_path), ("_OWN_GROUP", tmp_path / "cgroup"), ("_VMSTAT", tmp_path / "vmstat")):
        monkeypatch.setattr(hardware, name, path)
    assert hardware.memory_kills() == 42
    (tmp_path / "vmstat").unlink()
    assert hardware.memory_kills() == 2


def test_a_signal_that_was_passed_on_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: object) -> None:
        raise SignalException("stopped", sigval=signal.SIGTERM)

    monkeypatch.setattr(launch.torchrun, "run", stopped)
    with pytest.raises(SystemExit) as left:
        launch.main(["--standalone", "rank.py"])
    assert left.value.code == 143
