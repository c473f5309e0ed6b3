"""One rank of the trainer's own command, which also leaves what it took of its GPU in the output folder.

``memory`` reads what the ranks left.
"""

import json
import os
import sys
from pathlib import Path

import torch

from qsharded import train
from qsharded.cli.command import run_as_process
from qsharded.config import TrainConfig, builtin_overrides, parse


def main() -> None:
    train.main()
    if torch.cuda.is_available():
        output = Path(parse(sys.argv[1:], TrainConfig, fill=builtin_overrides).output_dir)
        (output / f"memory-{os.environ['RANK']}.json").write_text(json.dumps(_taken()))


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


if __name__ == "__main__":
    run_as_process(main)
