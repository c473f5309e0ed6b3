"""The two-GPU record's runner and verdicts, and the cheap lines of its short form, over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.two_gpus.__main__ import main
from benchmarks.two_gpus.large import LARGE
from benchmarks.two_gpus.lines import lines
from benchmarks.two_gpus.runner import Job, Runner
from benchmarks.two_gpus.small import as_expected


def leaves(came: dict[str, Any], missed: list[str]) -> str:
    """A program that leaves this as what it found."""
    text = json.dumps({"came": came, "missed": missed})
    return f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({text!r})"


PASSES = leaves({"x": 1}, [])


def job(folder: Path, name: str, program: str, limit_s: float = 60, **settings: Any) -> Job:
    result = folder / f"{name}.found.json"
    return Job(name, "asked", [sys.executable, "-c", program, str(result)], result, limit_s, **settings)


def recorded(folder: Path, jobs: list[Job], at_once: int = 1, minutes: float = 5) -> tuple[bool, dict[str, Any]]:
    """Whether all passed, and the lines of the record by name."""
    runner = Runner({"head": 0}, folder / "record.json", folder, time.monotonic() + 60 * minutes)
    passed = runner.run(jobs, at_once)
    record = json.loads((folder / "record.json").read_text())
    assert (record["head"], record["of"]) == (0, len(jobs))
    assert record["passed"] == sum(line["passed"] for line in record["lines"])
    assert [line["name"] for line in record["lines"]] == [job.name for job in jobs]
    return passed, {line["name"]: line for line in record["lines"]}


def test_a_line_that_fails_is_recorded_with_its_cause_and_the_others_go_on(tmp_path: Path) -> None:
    raises = "import sys; print('a note', file=sys.stderr); raise ValueError('the cause')"
    programs = {"raises": raises, "silent": "", "misses": leaves({"x": 2}, ["y"]), "passes": PASSES}
    passed, found = recorded(tmp_path, [job(tmp_path, name, program) for name, program in programs.items()])
    assert not passed
    assert {name: line["passed"] for name, line in found.items()} == {name: name == "passes" for name in programs}
    assert found["raises"]["missed"] == ["exit status 1: ValueError: the cause"]
    assert found["silent"]["missed"] == ["exit status 0: no output"]
    assert (found["misses"]["came"], found["misses"]["missed"]) == ({"x": 2}, ["y"])
    assert (found["passes"]["came"], found["passes"]["asked"]) == ({"x": 1}, "asked")


def test_all_lines_passing_is_passing(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "beside", PASSES), job(tmp_path, "alone", PASSES, alone=True)]
    assert recorded(tmp_path, jobs)[0]


def test_a_line_over_its_limit_fails_and_its_ranks_end_with_it(tmp_path: Path) -> None:
    """As torchrun's ranks do, the process of the line's process has a session of its own."""
    pid = tmp_path / "pid"
    rank = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    passed, found = recorded(tmp_path, [job(tmp_path, "hangs", launcher, 5), job(tmp_path, "passes", PASSES)])
    assert not passed
    assert found["hangs"]["missed"] == ["not done after 5 s"]
    assert found["passes"]["passed"]
    assert not is_alive(int(pid.read_text()))


def is_alive(pid: int) -> bool:
    """A zombie, which only its parent can remove, is not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_what_the_budget_leaves_out_is_recorded_and_has_not_passed(tmp_path: Path) -> None:
    passed, found = recorded(tmp_path, [job(tmp_path, "late", PASSES)], minutes=0)
    assert not passed
    assert (found["late"]["passed"], found["late"]["missed"]) == (False, ["not run: out of time"])


def test_a_line_waits_for_the_one_that_it_needs(tmp_path: Path) -> None:
    first = f"import time; time.sleep(1); {PASSES}"
    second = f"import pathlib; assert pathlib.Path({str(tmp_path / 'first.found.json')!r}).is_file(); {PASSES}"
    jobs = [job(tmp_path, "first", first), job(tmp_path, "second", second, after="first")]
    assert recorded(tmp_path, jobs, at_once=2)[0]


@pytest.mark.parametrize(
    ("loss", "norm", "missed"),
    [(2.001, 3.02, []), (2.003, 3.0, ["loss"]), (2.0, 3.04, ["grad_norm"]), (float("nan"), 3.0, ["loss"])],
)
def test_a_mode_is_held_to_losses_and_norms_of_every_step(loss: float, norm: float, missed: list[str]) -> None:
    expected = [{"loss": 2.0, "grad_norm": 3.0}] * 3
    rows = [expected[0], {"loss": loss, "grad_norm": norm}, expected[2]]
    assert as_expected(rows, expected).missed == missed


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"plan_gap": 0.11}, ["plan"]),
        ({"plan_gap": -0.11}, ["plan"]),
        ({"tokens_per_second_a_gpu": 1099.0}, ["speed"]),
        ({"reserved_gib": 24.1}, ["memory"]),
    ],
)
def test_a_large_run_is_held_to_its_figures(changed: dict[str, float], missed: list[str]) -> None:
    case = replace(LARGE[0], least_speed=1100.0, most_gib=24.0)
    came = {"plan_gap": 0.09, "tokens_per_second_a_gpu": 1101.0, "reserved_gib": 23.9} | changed
    assert case._missed_figures(came) == missed


@pytest.mark.parametrize(
    ("speed", "loss", "missed"), [(90.0, 2.0, []), (89.0, 2.0, ["speed"]), (90.0, 2.005, ["losses"])]
)
def test_two_gpus_are_held_to_one(
    monkeypatch: pytest.MonkeyPatch, speed: float, loss: float, missed: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    case = next(case for case in LARGE if case.like)
    one = {"losses": [3.0, 2.0], "tokens_per_second_a_gpu": 100.0}
    assert case._compare({"losses": [3.0, loss], "tokens_per_second_a_gpu": speed}, one) == missed


def test_lines_stand_behind_those_they_need_and_measured_ones_run_alone() -> None:
    names = [line.name for line in lines()]
    assert len(set(names)) == len(names)
    for line in lines():
        assert line.after is None or names.index(line.after) < names.index(line.name)
        assert line.alone == (line.name in {case.name for case in LARGE})


@pytest.mark.slow
def test_the_short_form_passes_its_lines(tmp_path: Path) -> None:
    """`full` brings the run on one rank that it is held to."""
    flags = ["--short", "--record", str(tmp_path / "record.json"), "--lines", "full", "70b-1x2048"]
    command = [sys.executable, "-m", "benchmarks.two_gpus", *flags]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert [line["name"] for line in record["lines"]] == ["one-gpu", "full", "70b-1x2048"]
    assert record["lines"][1]["came"]["largest_loss_gap"] < 1e-5  # fp32 on a CPU
    assert len(record["lines"][2]["came"]["losses"]) == 5
    assert torch.__version__.startswith(record["versions"]["torch"])  # the former may name its build
    assert record["command"].startswith("python -m benchmarks.two_gpus --short")


def test_the_exit_status_says_that_a_line_has_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    record = tmp_path / "record.json"
    flags = ["--short", "--record", str(record), "--minutes", "0", "--lines"]
    monkeypatch.setattr(sys, "argv", ["two_gpus", *flags, "merge"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert [(line["name"], line["passed"]) for line in json.loads(record.read_text())["lines"]] == [
        ("built-in", False),
        ("merge", False),
    ]
    monkeypatch.setattr(sys, "argv", ["two_gpus", *flags, "nothing"])
    with pytest.raises(SystemExit, match="there is no line nothing: gather, built-in"):
        main()
