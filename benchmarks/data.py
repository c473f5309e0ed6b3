"""Data at scale: how long tokenizing takes against a plain pool, a second start, memory of a rank, finding turns.

    python -m benchmarks.data --folder DIR [--rows 1000000] [--minutes 7] [--pool-rows N] [--fill-rows N] [--record F]

Conversations of made-up words are written into files, with a tokenizer that is trained on some of them and Qwen3's
template; all stays in --folder. Then pieces of two are timed in turn, since other work on the machine comes and goes:
a plain pool, of a process for each core, that reads the rows, runs the template and the tokenizer over them and gives
back the ids; and a first start, which fills the cache. Its processes are killed at the end of a piece, and the next one
goes on; what they had not noted counts as time. The ratio of CPU times stands beside that of times on the clock. After
--minutes the command leaves, and goes on when it is called again. With --fill-rows the first start is left when it has
so many rows, and the second is measured on a cache that holds those over and over, --rows in all: what a second start
does with a cache does not depend on how it was filled.
The exit status is 1 where a figure is not what it must be.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.cpu_time import cpu_seconds
from benchmarks.data_pool import plain_pool
from benchmarks.data_rows import FILES, prepare
from benchmarks.record import command, environment, write
from qsharded.data import Tokenizer
from qsharded.data.cache import DataCache
from qsharded.data.fill_progress import read_note
from qsharded.data.load import Reading
from qsharded.data.row_source import Files
from qsharded.data.sources import find_files

PIECE_S, POOL_ROWS = 60.0, 25_000
POLL_S = 0.2
MUST = {
    "first start / plain pool": 1.2,
    "second start, s": 3.0,
    "second start with packing, s": 3.0,
    "memory above 1,000 rows, MB": 400.0,
    "100 turns, ms": 40.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=7.0, help="after which the command leaves, to be called again")
    parser.add_argument("--pool-rows", type=int, default=POOL_ROWS, help="of a piece of the plain pool")
    parser.add_argument("--fill-rows", type=int, help="rows to measure the first start on; by default all")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    ends = time.monotonic() + 60 * arguments.minutes
    prepare(folder, arguments.rows)
    pieces = Pieces(folder / "state.json")
    wanted = arguments.fill_rows or arguments.rows
    while not pieces.filled(wanted) and time.monotonic() + 2 * PIECE_S < ends:
        pieces.add_pool(folder, arguments.pool_rows)
        pieces.add_fill(folder, ends)
        print(json.dumps(pieces.state), flush=True)
    if not pieces.filled(wanted):
        print("not done yet: call the same command again")
        return
    with copied_up_to(folder, arguments.rows) if arguments.fill_rows else nullcontext():
        found = pieces.figures() | starts(folder) | {"100 turns, ms": turn_finding(folder)}
    print(json.dumps(found, indent=1))
    missed = misses(found)
    if arguments.record:
        record = {"command": command("benchmarks.data"), "rows": arguments.rows, "must": MUST, "figures": found}
        write(arguments.record, environment() | record | {"missed": missed})
    sys.exit(bool(missed))


def misses(found: dict[str, Any]) -> list[str]:
    """The figures that are above what they must be."""
    return [name for name, most in MUST.items() if found[name] > most]


class Pieces:
    """Times of the pieces so far, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.state: dict[str, Any] = {"pool": [], "fill": [], "rows": 0}
        if path.exists():
            self.state = json.loads(path.read_text())

    def filled(self, rows: int) -> bool:
        """Whether so many are in the cache."""
        return bool(self.state["rows"] >= rows)

    def add_pool(self, folder: Path, most: int) -> None:
        """Time the plain pool on ``most`` rows, each time from the next file on."""
        done = len(self.state["pool"])
        paths = [folder / "rows" / f"{(done + number) % FILES}.jsonl" for number in range(FILES)]
        before = cpu_seconds(os.getpid())
        seconds, rows, tokens = plain_pool(folder / "model", paths, most)
        taken = {"seconds": round(seconds, 2), "cpu": round(cpu_seconds(os.getpid()) - before, 2)}
        self.state["pool"].append(taken | {"rows": rows, "tokens": tokens})
        self._save()

    def add_fill(self, folder: Path, ends: float) -> None:
        """Time a piece of the first start; the last goes on to the end, if that is in time."""
        words = [sys.executable, "-m", "benchmarks.data_rank", str(folder), "fill"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None, "it was asked for"
        process.stdout.readline()  # its imports are done
        start, before = time.monotonic(), cpu_seconds(process.pid)
        while (taken := cpu_seconds(process.pid)) and time.monotonic() < min(start + PIECE_S, ends):
            if process.poll() is not None:
                break
            time.sleep(POLL_S)
        process.kill()
        process.wait()
        self.state["fill"].append({"seconds": round(time.monotonic() - start, 2), "cpu": round(taken - before, 2)})
        self.state["rows"] = read_note(cached(folder))["rows"]
        self._save()

    def figures(self) -> dict[str, float]:
        """Milliseconds a row of each, and their ratio."""
        done, tokens = self._sum("pool", "rows"), self._sum("pool", "tokens")
        pool = 1000 * self._sum("pool", "seconds") / done
        fill = 1000 * self._sum("fill", "seconds") / self.state["rows"]
        cpu = self._sum("fill", "cpu") / self.state["rows"] * done / self._sum("pool", "cpu")
        return {
            "tokens a row": round(tokens / done, 1),
            "rows of the plain pool": done,
            "rows of the first start": self.state["rows"],
            "plain pool, ms a row": round(pool, 3),
            "first start, ms a row": round(fill, 3),
            "first start / plain pool": round(fill / pool, 3),
            "the same of CPU time": round(cpu, 3),
        }

    def _sum(self, what: str, name: str) -> float:
        return sum(float(piece[name]) for piece in self.state[what])

    def _save(self) -> None:
        self._path.write_text(json.dumps(self.state))


def cached(folder: Path) -> Path:
    """The folder of the cache that holds the rows, or some of them so far."""
    found = [path for path in (folder / "cache").iterdir() if path.is_dir() and path.name != "files"]
    return max(found, key=lambda path: int(read_note(path)["rows"]) if (path / "done.json").exists() else 0)


@contextmanager
def copied_up_to(folder: Path, rows: int) -> Iterator[None]:
    """A cache of ``rows`` rows, made of those that are there, and removed afterwards."""
    part = cached(folder)
    note = read_note(part)
    times = -(-rows // note["rows"])
    stored = DataCache(folder / "cache", Tokenizer.from_folder(folder / "model"), Reading(max_length=2048))
    whole = stored.folder / stored._key(Files(find_files(folder / "rows", "train")))
    whole.mkdir()
    for name, size in zip(("tokens.bin", "facts.bin"), note["sizes"], strict=True):
        content = (part / name).read_bytes()[:size]
        with (whole / name).open("wb") as file:
            file.writelines([content] * times)
    (whole / "done.json").write_text(json.dumps(note | {"rows": times * note["rows"]}))
    try:
        yield
    finally:
        shutil.rmtree(whole)


def starts(folder: Path) -> dict[str, Any]:
    """A second start with and without packing, and what a rank has in memory at most after so many batches."""
    plain, packed, small = (rank(folder, *words) for words in (["start"], ["start", "packing"], ["start", "small"]))
    return {
        "second start, s": plain["seconds"],
        "second start with packing, s": packed["seconds"],
        "CPU time of these, s": [plain["cpu"], packed["cpu"]],
        "memory of a rank, MB": max(plain["mb"], packed["mb"]),
        "memory above 1,000 rows, MB": round(max(plain["mb"], packed["mb"]) - small["mb"], 1),
    }


def rank(folder: Path, *words: str) -> dict[str, float]:
    """The fastest of three processes: other work on the machine only adds to their time."""
    found = []
    for _ in range(3):
        line = [sys.executable, "-m", "benchmarks.data_rank", str(folder), *words]
        said = subprocess.run(line, check=True, stdout=subprocess.PIPE)
        found.append(json.loads(said.stdout.splitlines()[-1]))
    result: dict[str, float] = sorted(found, key=lambda one: one["seconds"])[0]
    return result


def turn_finding(folder: Path, turns: int = 100) -> float:
    """Milliseconds of CPU time to find the turns of a conversation of so many: of the first, or the median if more."""
    from qsharded.data.formats import Conversation

    tokenizer, times = Tokenizer.from_folder(folder / "model"), []
    for number in range(8):
        words = (f"some words about number {number * turns + turn}" for turn in range(2 * turns))
        messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(words)]
        chat = Conversation(messages, [message["role"] == "assistant" for message in messages])
        text = tokenizer.render(messages)
        start = time.process_time()
        spans, _ = tokenizer.assistant_spans(chat, text)
        assert len(spans) == turns
        times.append(1000 * (time.process_time() - start))
    return round(max(times[0], sorted(times)[len(times) // 2]), 4)  # templates that are known take microseconds


def peak_mb() -> float:
    """What this process had in memory at most, in MB of 10^6 bytes."""
    # not what getrusage says, which holds for the process that started this one too
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
