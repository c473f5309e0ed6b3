"""One rank of the trainer's own command, which also leaves in the output folder what it took of its GPU, and how long
each step took.

``memory`` and ``step_seconds`` read what the ranks left.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from qsharded import train
from qsharded.cli.command import run_as_process
from qsharded.config import TrainConfig, builtin_overrides, parse


def main() -> None:
    marks: list[torch.Event | float] = []
    hook = register_optimizer_step_post_hook(lambda *_: marks.append(_mark()))
    train.main()
    hook.remove()
    output = Path(parse(sys.argv[1:], TrainConfig, fill=builtin_overrides).output_dir)
    rank = os.environ["RANK"]
    (output / f"seconds-{rank}.json").write_text(json.dumps([_between(*pair) for pair in pairwise(marks)]))
    if torch.cuda.is_available():
        (output / f"memory-{rank}.json").write_text(json.dumps(_taken()))


def _mark() -> "torch.Event | float":
    """On a GPU when it will be there, which is not waited for."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.Event("cuda", enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return float(after - before)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _taken() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "used": total - free,
    }


def memory(output: Path) -> dict[str, int]:
    """The most bytes that any rank allocated, reserved, and had in use at the end; {} without GPUs."""
    ranks = [json.loads(path.read_text()) for path in output.glob("memory-*.json")]
    return {key: max(rank[key] for rank in ranks) for key in (ranks[0] if ranks else ())}


def step_seconds(output: Path) -> list[float]:
    """From the end of each step to that of the next, the slowest rank's."""
    ranks = [json.loads(path.read_text()) for path in output.glob("seconds-*.json")]
    return [max(seconds) for seconds in zip(*ranks, strict=True)]


if __name__ == "__main__":
    run_as_process(main)
