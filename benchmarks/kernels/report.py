"""The table and the record."""

import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.measure import Row
from benchmarks.record import command, environment, version

DTYPE = "bfloat16"  # of weights before they are quantized, of x, and of what is dequantized
_HEADINGS = f"{'contender':14}{'median us':>11}{'p20':>10}{'p80':>10}{'of limit':>10}{'speed-up':>10}{'error':>10}"


def heading(ceilings: Ceilings) -> str:
    """What the fractions are fractions of."""
    return (
        f"copy {ceilings.copy / 1e12:.3f} TB/s, matmul {ceilings.matmul / 1e12:.1f} TFLOP/s (bf16), this run's limits"
    )


def table(label: str, rows: list[Row]) -> str:
    """One case's rows."""
    return "\n".join([f"\n{label} (limit {rows[0].limit:.1f} us)", _HEADINGS, *map(_line, rows)])


def _line(row: Row) -> str:
    if row.times is None:
        return f"{row.contender:14}{row.problem}"
    microseconds = "".join(f"{value:{width}.1f}" for value, width in zip(_numbers(row), (11, 10, 10), strict=True))
    speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
    return f"{row.contender:14}{microseconds}{row.fraction:10.1%}{speedup:>10}{row.error:10.1e}"


def _numbers(row: Row) -> tuple[float, float, float]:
    assert row.times is not None
    return row.times.median, row.times.p20, row.times.p80


def record(module: str, device: torch.device, ceilings: Ceilings, repeats: int, rows: list[Row]) -> dict[str, Any]:
    """What the run of ``module`` measured, and on what."""
    found = environment() | {"driver": driver(), "torchao": version("torchao"), "command": command(module)}
    found |= {"device": device.type, "threads": torch.get_num_threads(), "repeats": repeats}
    return found | {"dtype": DTYPE, "ceilings": asdict(ceilings), "rows": [row.as_record() for row in rows]}


def free_name(folder: Path, what: str, record: dict[str, Any]) -> str:
    """A name that no record in ``folder`` has: ``what``, device, date and commit, then a number where it takes one."""
    parts = [what, place(record), record["date"], (record["commit"] or "").removesuffix("-dirty")]
    name = "_".join(re.sub(r"[^a-z0-9-]+", "-", part.lower()).strip("-") for part in parts if part)
    numbered = (f"{name}_{number}" for number in range(2, 1000))
    return next(free for free in (name, *numbered) if not (folder / f"{free}.json").exists())


def place(record: dict[str, Any]) -> str:
    """The GPU; or the processor's threads, where it ran on that."""
    if record.get("device") == "cuda":
        return str(record["gpu"])
    return f"{record['processor']}, {record.get('threads', '?')} threads"


def driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
