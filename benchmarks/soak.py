"""Thousands of steps under random faults: the result of a run in peace, and nothing that grows.

    python -m benchmarks.soak [--steps 2000] [--seed 0] [--record FILE]

The built-in model trains on two ranks, once in peace and once while faults come at random steps: a rank is killed, or
stands still for a while, no file may grow (as on a full disk), reading the data fails, and the launcher is asked to
stop, after which the run is resumed. The record has what was seen of each, whether weights and moments are the same to
the last bit, and how far memory, open files and threads of each process moved between its first steps and its last.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks import restarts
from benchmarks.launch import flags_of
from benchmarks.record import command, environment, write
from qsharded.report.run_files import read_metrics

SAVED_EVERY, LOGGED_EVERY = 50, 10
FAULTS = {"killed": 4, "stopped and resumed": 2, "stood still": 5, "full disk": 5, "loader error": 2}
SEEN_AS = {
    "killed": "started again by torchrun",
    "stopped and resumed": "stopped by SIGTERM after step",
    "full disk": "File too large",
    "loader error": "the soak's dataset cannot be read",
}
STILL_S, FULL_S = 2.0, 4.0
SMALL_FILE = 4096  # bytes, beyond which none grows on the full disk
LEAST_SAMPLES = 50  # of a process, for it to be judged: 250 steps
# Beyond what a process in peace grew by at that age: allocators settle over some hundred steps.
MOST_GROWN_MIB = 8.0
_POLL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/soak.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, disturbed = (Soak(Path(scratch, name), given.steps) for name in ("whole", "disturbed"))
        whole.run([])
        disturbed.run(schedule(given.steps, Random(given.seed)))
        found = verdict(whole, disturbed)
    head = environment() | {"command": command("benchmarks.soak"), "steps": given.steps}
    write(given.record, head | found)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["missed"]))


def schedule(steps: int, random: Random) -> list[tuple[int, str]]:
    """(step, fault), in order; fewer of each where the run is short."""
    share = min(1.0, steps / 2000)
    faults = [fault for fault, count in FAULTS.items() for _ in range(max(1, round(count * share)))]
    return sorted((random.randrange(steps // 20, steps * 9 // 10), fault) for fault in faults)


@dataclass
class Soak:
    """A run in ``folder``."""

    folder: Path
    steps: int
    lines: list[str] = field(default_factory=list)
    caused: Counter[str] = field(default_factory=Counter)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def run(self, faults: list[tuple[int, str]]) -> None:
        """To the end, however often it is stopped."""
        self.folder.mkdir()
        waiting = list(faults)
        while not restarts.last_checkpoint(self.output, self.steps).exists():
            process = self._start()
            while process.poll() is None:
                if waiting and self._step() >= waiting[0][0] and len(restarts.ranks_of(process)) == restarts.RANKS:
                    self._cause(waiting.pop(0)[1], process)
                time.sleep(_POLL_S)
            self._reader.join()
            assert process.returncode in (0, 128 + signal.SIGTERM), "\n".join(self.lines[-40:])

    def _start(self) -> "subprocess.Popen[str]":
        options = restarts.OPTIONS | {
            "max_steps": self.steps,
            "save_steps": SAVED_EVERY,
            "save_total_limit": 3,
            "logging_steps": LOGGED_EVERY,
            "output_dir": self.output,
            "resume_from_checkpoint": "auto",
        }
        elastic = ["--standalone", f"--nproc-per-node={restarts.RANKS}", "--max-restarts=99", "--monitor-interval=0.1"]
        words = [*elastic, "-m", "benchmarks.soak_rank", str(self.folder), *flags_of(options)]
        process = subprocess.Popen(
            [sys.executable, "-m", "qsharded.launch", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()
        return process

    def _read(self, lines: Any) -> None:
        self.lines.extend(line.rstrip() for line in lines)

    def _step(self) -> int:
        path = self.output / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return max((row["step"] for row in rows), default=0)

    def _cause(self, fault: str, process: "subprocess.Popen[str]") -> None:
        ranks = restarts.ranks_of(process)
        self.caused[fault] += 1
        print(f"step {self._step()}: {fault}", flush=True)
        if fault == "killed":
            os.kill(ranks[self.caused[fault] % len(ranks)], signal.SIGKILL)
        elif fault == "stopped and resumed":
            process.send_signal(signal.SIGTERM)
            process.wait()
        elif fault == "stood still":
            os.kill(ranks[-1], signal.SIGSTOP)
            time.sleep(STILL_S)
            os.kill(ranks[-1], signal.SIGCONT)
        elif fault == "full disk":
            _let_files_grow(ranks, SMALL_FILE)
            time.sleep(FULL_S)
            _let_files_grow(ranks, resource.RLIM_INFINITY)
        else:
            (self.folder / "loader-error").touch()
        self._wait_until_it_goes_on(process)

    def _wait_until_it_goes_on(self, process: "subprocess.Popen[str]") -> None:
        """So that the next fault meets a run that trains."""
        before = self._step()
        while process.poll() is None and self._step() in (before, 0):
            time.sleep(_POLL_S)

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """What each process that lived long enough held, every few steps."""
        read = {
            path.stem.removeprefix("held-"): [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(self.folder.glob("held-*.jsonl"))
        }
        return {process: rows for process, rows in read.items() if len(rows) >= LEAST_SAMPLES}


def _let_files_grow(pids: list[int], size: int) -> None:
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def moved(rows: list[dict[str, Any]]) -> dict[str, float]:
    """From the second quarter of a process's samples to the last one, in the median."""
    quarter = len(rows) // 4
    first, last = rows[quarter : 2 * quarter], rows[-quarter:]
    keys = [key for key in rows[0] if key != "step"]
    return {key: round(median(row[key] for row in last) - median(row[key] for row in first), 1) for key in keys}


def judged(whole: Soak, disturbed: Soak) -> list[dict[str, Any]]:
    """What moved in each process; of those that were disturbed also how much one in peace had grown by at that age."""
    in_peace, found = whole.samples(), []
    for process, rows in (in_peace | disturbed.samples()).items():
        life = {"process": process, "steps": rows[-1]["step"] - rows[0]["step"]} | moved(rows)
        if process not in in_peace:
            life["host_mib_in_peace"] = max(moved(peace[: len(rows)])["host_mib"] for peace in in_peace.values())
        found.append(life)
    return found


def has_grown(life: dict[str, Any]) -> bool:
    """Whether a process holds more and more."""
    beyond = life["host_mib"] - max(0.0, life.get("host_mib_in_peace", 0.0))
    return life["files"] > 0 or life["threads"] > 0 or max(beyond, life["device_mib"]) > MOST_GROWN_MIB


def verdict(whole: Soak, disturbed: Soak) -> dict[str, Any]:
    """What was seen, and what was missed."""
    text = "\n".join(disturbed.lines)
    seen = {fault: text.count(words) for fault, words in SEEN_AS.items()}
    assert whole.samples(), "the run in peace was too short to be judged"
    lives = judged(whole, disturbed)
    equal = final(whole) == final(disturbed) and len(final(whole)) > 1
    missed = ["weights and moments"] * (not equal)
    missed += [f"{fault}: seen {count} times" for fault, count in seen.items() if count < disturbed.caused[fault]]
    missed += [f"grew: {life}" for life in lives if has_grown(life)]
    return {
        "equal": equal,
        "caused": dict(disturbed.caused),
        "seen_in_the_log": seen,
        "processes_judged": len(lives),
        "moved": lives,
        "missed": missed,
    }


def final(soak: Soak) -> dict[str, str]:
    """The hashes of the last checkpoint and of the adapter."""
    return restarts.final(soak.output, soak.steps)


if __name__ == "__main__":
    main()
