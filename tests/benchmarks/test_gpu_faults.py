"""The verdicts on faults that take GPUs, and the record's short form, over gloo."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_faults.faults import BAD_STEP, MINUTES, hang_found, not_finite_found, restart_found
from benchmarks.gpu_faults.out_of_memory import found_of
from benchmarks.gpu_faults.ranks import Rank
from benchmarks.gpu_faults.self_check import found_of as self_check_found

HUNG = f"error (rank 0): no progress of any rank for {MINUTES:g} minutes: rank 1 does not answer (last: step 3); rank 0"


def hang(
    folder: Path, lines: list[str], status: int = 75, seconds: float = 20, stacks: str = "trainer.py"
) -> list[str]:
    log = folder / "rank-0.txt"
    log.write_text("\n".join(lines))
    (folder / "rank-00000.txt").write_text(stacks)
    return hang_found(Rank(None, log), status, seconds, folder).missed


def test_a_hang_is_held_to_its_line_status_time_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record = tmp_path / "nccl-rank-00000.pickle"
    assert hang(tmp_path, [HUNG]) == ["flight record"]
    record.write_bytes(pickle.dumps({"entries": []}))
    assert hang(tmp_path, [HUNG]) == ["flight record"]
    entry = {"profiling_name": "nccl:all_reduce", "state": "started", "input_sizes": [[1]]}
    record.write_bytes(pickle.dumps({"entries": [entry]}))
    assert hang(tmp_path, [HUNG]) == []
    assert hang(tmp_path, [HUNG, HUNG]) == ["one line"]
    assert hang(tmp_path, [HUNG.replace("rank 1 does", "rank 0 does")]) == ["the rank"]
    assert hang(tmp_path, [HUNG], status=1) == ["exit status"]
    assert hang(tmp_path, [HUNG], seconds=60) == ["in time"]
    assert hang(tmp_path, [HUNG], stacks="") == ["stacks"]


def report(folder: Path, rank: int, loss: Any, text: str = "ask a, answer b") -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("{}\n" + json.dumps({"messages": [{"content": "ask a"}, {"content": "answer b"}]}) + "\n")
    return {"step": BAD_STEP, "rank": rank, "loss": loss, "documents": [{"rows": [f"{rows}:2"], "text": text}]}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"found": [0, 1]}, ["exit status"]),
        ({"hashes": ["a", "b", "c"]}, ["no step"]),
        ({"hashes": ["a", "a", "a"]}, ["a step after it"]),
        ({"losses": (2.0, 2.0)}, ["whose loss it was"]),
        ({"text": "another row"}, ["rows"]),
    ],
)
def test_a_bad_step_is_held_to_weights_and_rows(tmp_path: Path, changed: dict[str, Any], missed: list[str]) -> None:
    losses = changed.get("losses", (2.0, "inf"))
    text = {"text": changed["text"]} if "text" in changed else {}
    reports = [report(tmp_path, rank, loss, **text) for rank, loss in enumerate(losses)]
    hashes = changed.get("hashes", ["a", "a", "b"])
    assert not_finite_found(changed.get("found", [0, 0]), hashes, reports).missed == missed
    assert "a report of each rank" in not_finite_found([0, 0], hashes, reports[:1]).missed


def test_a_restart_is_held_to_the_undisturbed_bytes() -> None:
    whole = {"adapter/adapter_model.safetensors": "1", "optimizer-00000.safetensors": "2"}
    said = "resumed from x"
    assert restart_found([0, 0], said, [whole, dict(whole)], 9, 1.0).missed == []
    other = whole | {"optimizer-00000.safetensors": "3"}
    assert restart_found([0, 0], said, [whole, other], 9, 1.0).missed == [
        "the same bytes",
        "optimizer-00000.safetensors differs",
    ]
    assert restart_found([0, 1], "", [whole, dict(whole)], 9, 1.0).missed == ["exit status", "resumed"]
    assert restart_found([0, 0], said, [{}, {}], 9, 1.0).missed == ["adapter and moments"]


NO_ROOM = """qsharded.train: error (rank 1): out of GPU memory in step 1: CUDA out of memory. Tried to allocate 20 GiB
  GPU memory, GiB           planned  measured
  codes                       2.000     2.001
  scales                      0.100     0.100
  embedding and head          1.000     1.000
  adapters                    0.100     0.100
  gradients                   0.500
  allocated at the peak       9.000{peak}
what fits, one of:
  --activation-checkpointing full: needs 7.0 GiB"""


@pytest.mark.parametrize(
    ("old", "new", "missed"),
    [
        ("", "", []),
        ("step 1", "step 2", ["in step 1"]),
        ("2.001", "2.100", ["as planned"]),
        ("adapters  ", "nothing  ", ["planned and measured"]),
        (": needs", ": takes", ["what fits"]),
        ("at the peak", "at a time", ["the peak"]),
        ("out of GPU", "out of host", ["one message", "in step 1", "planned and measured", "the peak", "what fits"]),
    ],
)
def test_a_gpu_without_room_is_held_to_its_message(old: str, new: str, missed: list[str]) -> None:
    peak = "     8.500" if torch.cuda.is_available() else ""
    lines = NO_ROOM.format(peak=peak).replace(old, new).splitlines()
    assert found_of([74, 74], [[], lines], 1).missed == missed


CHECKED = "self-check: gather probe exact, layer 0 computes as its bytes unsharded: output within 1.00%; 0.25 s"


def test_the_self_check_is_held_to_its_line_time_and_memory() -> None:
    taken = {"allocated": 11 << 30}
    assert self_check_found([0, 0], [CHECKED], taken, 10.0, 0.0).missed == []
    assert self_check_found([0, 1], [CHECKED], taken, 10.0, 0.0).missed == ["exit status"]
    assert self_check_found([0, 0], [], taken, 10.0, 0.0).missed == ["one line", "a second at most"]
    assert self_check_found([0, 0], [CHECKED.replace("0.25", "1.25")], taken, 10.0, 0.0).missed == ["a second at most"]
    assert self_check_found([0, 0], [CHECKED.replace("0.25", "1.25")], taken, 10.0, 0.5).missed == []
    assert self_check_found([0, 0], [CHECKED], taken, 9.0, 0.0).missed == ["a layer's memory"]


@pytest.mark.slow
def test_the_short_form_passes_its_lines(tmp_path: Path) -> None:
    flags = ["--short", "--record", str(tmp_path / "record.json")]
    command = [sys.executable, "-m", "benchmarks.gpu_faults", *flags]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert [line["name"] for line in record["lines"]] == [
        *("hang", "not-finite", "restart", "self-check", "out-of-memory")
    ]
