"""A run that is killed and resumed has the losses of one that is not, to the last bit, and the same adapter.

    python -m benchmarks.resume [--ranks 1] [--runs builtin llama3-8b] [--record FILE]

Each run trains three times with ``--deterministic``: to the end; until all its ranks are killed (SIGKILL) at a step
between two checkpoints; and from there to the end with ``--resume-from-checkpoint auto``. More ranks than GPUs share
one over gloo, and then write no adapter. Without a GPU the built-in run is made on the CPU.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import SHAPES, shape_options
from benchmarks.launch import flags_of
from benchmarks.record import command, environment, write
from qsharded.checkpoint.files import read_record
from qsharded.report.run_files import read_metrics

STEPS, SAVE_STEPS, KILLED_AFTER = 15, 4, 10
POLL_S = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--runs", nargs="+", default=["builtin", "llama3-8b"], choices=["builtin", "llama3-8b"])
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/resume.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: measure(Path(scratch, name), name, arguments.ranks) for name in arguments.runs}
    record = environment() | {"command": command("benchmarks.resume"), "ranks": arguments.ranks, "runs": runs}
    write(arguments.record, record)
    print(json.dumps(record, indent=2))
    sys.exit(not all(run["losses_equal"] and run["adapters_equal"] is not False for run in runs.values()))


def measure(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    folder.mkdir()
    options = settings(folder, name)
    whole, stopped = folder / "whole", folder / "stopped"
    wait(start(options, whole, ranks))
    kill_after(KILLED_AFTER, start(options, stopped, ranks), stopped)
    killed_at = len(losses(stopped))
    kept = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    wait(start(options | {"resume_from_checkpoint": "auto"}, stopped, ranks))
    return {
        "losses_equal": losses(stopped) == losses(whole) and len(losses(whole)) == STEPS,
        "adapters_equal": adapter(stopped) == adapter(whole) if adapter(whole) else None,
        "killed_at_step": killed_at,
        "checkpoints_then": kept,
        "losses": losses(whole),
        "losses_resumed": losses(stopped),
    }


def settings(folder: Path, name: str) -> dict[str, Any]:
    """Dropout, so that random numbers matter; rows of many lengths, or of about 1,024 tokens."""
    common: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "deterministic": True,
    }
    if name == "builtin":
        return common
    rows = STEPS * common["per_device_train_batch_size"] * common["gradient_accumulation_steps"]
    return common | shape_options(SHAPES[name], folder / "data", rows, 1024) | {"random_init": True}


def start(options: dict[str, Any], output: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """The ranks of a run, each a process of ours: torchrun's are not killed with it."""
    flags = flags_of(options | {"output_dir": output})
    shares = torch.cuda.is_available() and ranks > torch.cuda.device_count()
    launcher = [sys.executable, "-m", "benchmarks.gpu_training_rank" if shares else "qsharded.train", *flags]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [subprocess.Popen(launcher, env=os.environ | shared | variables) for variables in own]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(processes: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait() for process in processes]
    assert not any(codes), f"ranks ended with {codes}"


def kill_after(step: int, processes: list[subprocess.Popen[bytes]], output: Path) -> None:
    while len(losses(output)) < step:
        assert all(process.poll() is None for process in processes), "a rank ended before it was to be killed"
        time.sleep(POLL_S)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in processes]
    assert codes == [-signal.SIGKILL] * len(processes), f"ranks ended with {codes} before they were killed"


def losses(output: Path) -> list[float]:
    path = output / "metrics.jsonl"
    return [row["loss"] for row in read_metrics(path) if "loss" in row] if path.exists() else []


def adapter(output: Path) -> str | None:
    path = output / "adapter" / "adapter_model.safetensors"
    return read_record(path).sha256 if path.exists() else None


if __name__ == "__main__":
    main()
