"""A rank that hangs, one whose loss is infinite, and one that is killed: the built-in model on two ranks."""

import json
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import restarts
from benchmarks.gpu_faults.ranks import BUILTIN, Rank, start, statuses, wait_for_steps
from benchmarks.two_gpus.runner import Found
from benchmarks.two_gpus.small import RANKS
from qsharded.checkpoint.files import read_record
from qsharded.utils.exit_codes import HANG

MINUTES = 0.25  # the first step compiles kernels meanwhile
SEEN_AT = 3  # steps, before a fault
TOLD_S = 3.0  # by then a rank has said that it trains
BAD_STEP, STEPS = 2, 3
KILLED_AT = 33  # of the restarted run's steps
ENDED_WITHIN_S = 20.0  # beyond the time-out


def hang(folder: Path) -> Found:
    """Rank 1 is stopped; rank 0 says so and leaves."""
    own, output = folder / "hang", folder / "hang" / "output"
    ranks = start(
        own, ["qsharded.train"], BUILTIN | {"max_steps": 10**6, "hang_timeout": MINUTES, "output_dir": output}
    )
    wait_for_steps(ranks, output, SEEN_AT)
    time.sleep(TOLD_S)
    ranks[1].process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    status = ranks[0].process.wait()
    seconds = time.monotonic() - stopped
    ranks[1].process.kill()
    statuses(ranks)
    return hang_found(ranks[0], status, seconds, output / "hang")


def hang_found(rank: Rank, status: int, seconds: float, folder: Path) -> Found:
    """What rank 0 said and left in ``folder``."""
    lines = [line for line in rank.said() if f"no progress of any rank for {MINUTES:g} minutes" in line]
    stacks, record = folder / "rank-00000.txt", folder / "nccl-rank-00000.pickle"
    flight = _flight(record)
    came = {
        "exit_status": status,
        "seconds_after_the_stop": round(seconds, 1),
        "printed": lines,
        "flight_record": flight,
    }
    held = {
        "exit status": status == HANG,
        "in time": seconds < 60 * MINUTES + ENDED_WITHIN_S,
        "one line": len(lines) == 1,
        "the rank": any("rank 1 does not answer (last: step " in line for line in lines),
        "stacks": stacks.is_file() and "trainer.py" in stacks.read_text(),
        "flight record": bool(flight.get("entries")) or not torch.cuda.is_available(),
    }
    return Found(came, _missed(held))


def _flight(path: Path) -> dict[str, Any]:
    """How many collectives NCCL's record has, and the last one that had not completed."""
    if not path.is_file():
        return {}
    entries = pickle.loads(path.read_bytes())["entries"]  # of a process of our own
    waiting = [entry for entry in entries if entry.get("state") != "completed"]
    last = (waiting or entries or [{}])[0]
    return {
        "bytes": path.stat().st_size,
        "entries": len(entries),
        "not_completed": len(waiting),
        "first_of_them": {key: str(last.get(key)) for key in ("profiling_name", "state", "input_sizes")},
    }


def not_finite(folder: Path) -> Found:
    """Rank 1's loss is infinite in one step."""
    own, output = folder / "not-finite", folder / "not-finite" / "output"
    options = BUILTIN | {"max_steps": STEPS, "max_skipped_steps": 1, "save_steps": 1, "output_dir": output}
    options |= {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    ranks = start(own, ["benchmarks.gpu_faults.rank", f"infinite:{BAD_STEP}"], options)
    found = statuses(ranks)
    hashes = [_hash(output / "checkpoints" / f"step-{step:06d}", "adapter") for step in range(1, STEPS + 1)]
    reports = [json.loads(path.read_text()) for path in sorted((output / "not-finite").glob("*.json"))]
    return not_finite_found(found, hashes, reports)


def not_finite_found(found: list[int], hashes: list[str], reports: list[dict[str, Any]]) -> Found:
    """``hashes``: of the adapter after each step. ``reports``: what the ranks wrote of the bad one."""
    documents = [document for report in reports for document in report["documents"]]
    named = [f"{report['rank']}: {document['rows'][:1]}" for report in reports for document in report["documents"]]
    before, after = BAD_STEP - 2, BAD_STEP - 1
    held = {
        "exit status": found == [0] * RANKS,
        "no step": hashes[before] == hashes[after],
        "a step after it": len(set(hashes[after:])) == len(hashes[after:]),
        "a report of each rank": [(r["step"], r["rank"]) for r in reports]
        == [(BAD_STEP, rank) for rank in range(RANKS)],
        "whose loss it was": [isinstance(report["loss"], str) for report in reports] == [False, True],
        "rows": bool(documents) and all(map(_is_of_its_row, documents)),
    }
    came = {"exit_statuses": found, "losses": [report["loss"] for report in reports], "rows": named[:6]}
    return Found(came, _missed(held))


def _is_of_its_row(document: dict[str, Any]) -> bool:
    """Whether a row that is named holds what the document says."""
    path, _, line = (document["rows"] or [":0"])[0].rpartition(":")
    if not Path(path).is_file():
        return False
    row = json.loads(Path(path).read_text().splitlines()[int(line) - 1])
    return all(message["content"] in document["text"] for message in row["messages"])


def restart(folder: Path) -> Found:
    """One run undisturbed beside one whose rank 1 is killed, both under our launcher."""
    own = folder / "restart"
    own.mkdir()
    whole, killed = own / "whole", own / "killed"
    logs = {output: own / f"{output.name}.txt" for output in (whole, killed)}
    runs = {output: restarts.launch("qsharded.launch", output, log) for output, log in logs.items()}
    while restarts.logged(killed) < KILLED_AT:
        assert runs[killed].poll() is None, logs[killed].read_text()
        time.sleep(0.02)
    os.kill(restarts.ranks_of(runs[killed])[1], signal.SIGKILL)
    at, died = restarts.logged(killed), time.monotonic()
    found = [run.wait() for run in runs.values()]
    seconds = time.monotonic() - died
    print(*(log.read_text() for log in logs.values()), sep="\n---\n")
    return restart_found(found, logs[killed].read_text(), [*map(restarts.final, (whole, killed))], at, seconds)


def restart_found(found: list[int], said: str, finals: list[dict[str, str]], killed_at: int, seconds: float) -> Found:
    """``finals``: hashes of the undisturbed run's files and of the other's."""
    whole, killed = finals
    came: dict[str, Any] = {
        "exit_statuses": found,
        "killed_at_step": killed_at,
        "seconds_from_kill_to_end": round(seconds, 1),
        "files": len(whole),
        "printed": [
            line for line in said.splitlines() if "started again by torchrun" in line or "resumed from" in line
        ],
    }
    held = {
        "exit status": found == [0, 0],
        "resumed": any("resumed from" in line for line in came["printed"]),
        "adapter and moments": all(any(part in name for name in whole) for part in ("adapter", "optimizer")),
        "the same bytes": whole == killed,
    }
    return Found(came, _missed(held) + [f"{name} differs" for name in sorted(whole) if whole[name] != killed.get(name)])


def _hash(*parts: "str | Path") -> str:
    path = Path(*parts) / "adapter_model.safetensors"
    return read_record(path).sha256 if path.is_file() else f"no {path}"


def _missed(held: dict[str, bool]) -> list[str]:
    return [name for name, holds in held.items() if not holds]
