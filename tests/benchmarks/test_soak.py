"""What the soak and the trials of restarts hold their runs to."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import restarts
from benchmarks.soak import FAULTS, LEAST_SAMPLES, MOST_GROWN_MIB, SEEN_AS, Soak, schedule, verdict

STEPS = 2000


def a_soak(folder: Path, *, growth_mib: float = 0.0, files: int = 7, adapter: bytes = b"weights") -> Soak:
    """One that has run: a process of so many samples, whose memory and files end so."""
    last = restarts.last_checkpoint(folder / "output", STEPS)
    for path in (last / "optimizer-0.safetensors", folder / "output" / "adapter" / "adapter_model.safetensors"):
        path.parent.mkdir(parents=True)
        path.write_bytes(adapter)
    rows = [
        {"step": 5 * n, "host_mib": 300 + growth_mib * (n / LEAST_SAMPLES), "device_mib": 0, "files": 7, "threads": 9}
        for n in range(LEAST_SAMPLES)
    ]
    rows[-LEAST_SAMPLES // 4 :] = [row | {"files": files} for row in rows[-LEAST_SAMPLES // 4 :]]
    (folder / f"held-0-{folder.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Soak(folder, STEPS)


def disturbed(folder: Path, **settings: Any) -> Soak:
    soak = a_soak(folder, **settings)
    for fault, words in SEEN_AS.items():
        soak.caused[fault] += 1
        soak.lines.append(f"rank 0: {words} 9")
    return soak


@pytest.mark.parametrize(
    ("settings", "missed"),
    [
        ({}, []),
        ({"adapter": b"others"}, ["weights and moments"]),
        ({"growth_mib": 4 * MOST_GROWN_MIB}, ["grew"]),
        ({"files": 8}, ["grew"]),
    ],
)
def test_a_soak_is_held_to_its_end_and_to_what_processes_hold(
    tmp_path: Path, settings: dict[str, Any], missed: list[str]
) -> None:
    found = verdict(a_soak(tmp_path / "whole"), disturbed(tmp_path / "disturbed", **settings))
    assert [line.partition(":")[0] for line in found["missed"]] == missed
    assert found["processes_judged"] == 2


def test_growth_is_measured_against_a_process_in_peace_and_that_one_by_itself(tmp_path: Path) -> None:
    grows = {"growth_mib": 4 * MOST_GROWN_MIB}
    found = verdict(a_soak(tmp_path / "whole", **grows), disturbed(tmp_path / "disturbed", **grows))
    assert ["held" if "whole" in line else "not" for line in found["missed"]] == ["held"]


def test_a_fault_that_nobody_saw_is_missed(tmp_path: Path) -> None:
    soak = disturbed(tmp_path / "disturbed")
    soak.lines.pop()
    missed = verdict(a_soak(tmp_path / "whole"), soak)["missed"]
    assert missed == ["loader error: seen 0 times"]


def test_all_faults_are_scheduled_in_order_and_leave_the_end_in_peace() -> None:
    planned = schedule(STEPS, Random(0))
    assert planned == sorted(planned)
    assert {fault for _, fault in planned} == FAULTS.keys()
    assert len(planned) == sum(FAULTS.values())
    assert all(STEPS // 20 <= step < STEPS for step, _ in planned)
    assert {fault for _, fault in schedule(100, Random(0))} == FAULTS.keys()
