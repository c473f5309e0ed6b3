"""Ranks are killed (SIGKILL) at random moments: the launcher starts them again, and the end is that of a run in peace.

    python -m benchmarks.restarts [--trials 20] [--record FILE]

Each trial trains the built-in model on two ranks over gloo, or over NCCL where there are two GPUs, and kills one or two
of its processes. What must be equal to the last bit is the last checkpoint: weights and the optimizer's moments.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.launch import flags_of
from benchmarks.record import command, environment, write
from benchmarks.two_gpus.small import RANKS, SMALL, UNEVALUATED
from qsharded.checkpoint.files import read_record
from qsharded.training.restarting import OWN_STORE

STEPS, SAVED_EVERY = 60, 5
OPTIONS: dict[str, Any] = SMALL | UNEVALUATED | {
    "max_steps": STEPS,
    "save_steps": SAVED_EVERY,
    "per_device_train_batch_size": 2,
    "deterministic": True,
    "lora_dropout": 0.1,
}  # fmt: skip
LAUNCHERS = {"torchrun": "torch.distributed.run", "qsharded.launch": "qsharded.launch"}
MOST_KILLS = 2
_POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of each launcher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/restarts.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole, seconds = undisturbed(folder / "whole")
        lines = []
        for launcher in LAUNCHERS:
            for number in range(given.trials):
                line = trial(
                    folder / f"{launcher}-{number}", launcher, Random(f"{given.seed} {number}"), whole, seconds
                )
                lines.append({"launcher": launcher, "trial": number} | line)
                print(json.dumps(lines[-1]), flush=True)
    head = environment() | {"command": command("benchmarks.restarts"), "files": len(whole), "first_step_s": seconds}
    equal = {name: sum(bool(line["equal"]) for line in lines if line["launcher"] == name) for name in LAUNCHERS}
    write(given.record, head | {"trials_of_each": given.trials, "equal": equal, "lines": lines})
    sys.exit(sum(equal.values()) != len(lines))


def undisturbed(output: Path) -> tuple[dict[str, str], float]:
    """The hashes of a run in peace, and after how many seconds it had done its first step."""
    start = time.monotonic()
    run = launch("qsharded.launch", output, output.with_suffix(".txt"))
    while not logged(output) and run.poll() is None:
        time.sleep(_POLL_S)
    seconds = time.monotonic() - start
    assert run.wait() == 0, output.with_suffix(".txt").read_text()
    return final(output), round(seconds, 1)


def trial(output: Path, launcher: str, random: Random, whole: dict[str, str], seconds: float) -> dict[str, Any]:
    """One run, of which one rank is killed at a random step, or in a random moment before the first."""
    log = output.with_suffix(".txt")
    run, killed = launch(launcher, output, log), []
    for _ in range(random.randint(1, MOST_KILLS)):
        rank, after_steps, after_s = random.randrange(RANKS), random.randrange(-STEPS // 2, STEPS - 5), random.random()
        _wait(run, output, max(0, after_steps), after_s * seconds if after_steps < 0 else 0.0)
        if run.poll() is None and len(pids := ranks_of(run)) == RANKS:
            os.kill(pids[rank], signal.SIGKILL)
            killed.append(logged(output))
    status, said = run.wait(), log.read_text()
    equal = status == 0 and final(output) == whole
    if not equal:
        print(said, file=sys.stderr)
    starts = said.count("started again by torchrun")
    return {
        "killed_after_steps": killed,
        "started_again": starts,
        "exit_status": status,
        "equal": equal and bool(killed),
    }


def _wait(run: "subprocess.Popen[bytes]", output: Path, steps: int, seconds: float) -> None:
    """Until so many steps are logged; before the first one, for so many seconds."""
    began, logged_then = time.monotonic(), logged(output)
    while run.poll() is None:
        now = logged(output)
        if steps <= now and (time.monotonic() - began >= seconds or now > logged_then) and ranks_of(run):
            return
        time.sleep(_POLL_S)


def launch(launcher: str, output: Path, log: Path) -> "subprocess.Popen[bytes]":
    """The run under a launcher that starts it again."""
    elastic = ["--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=3", "--monitor-interval=0.1"]
    flags = flags_of(OPTIONS | {"output_dir": output})
    words = [sys.executable, "-m", LAUNCHERS[launcher], *elastic, "-m", "qsharded.train", *flags]
    own_store = {OWN_STORE: "1"} if launcher == "torchrun" else {}
    with log.open("wb") as out:
        return subprocess.Popen(words, env=os.environ | own_store, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def ranks_of(run: "subprocess.Popen[Any]") -> list[int]:
    """The processes of the ranks that are alive, by rank."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(entry.partition("=")[::2] for entry in path.read_bytes().decode().split("\0"))
            status = path.with_name("status").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if f"\nPPid:\t{run.pid}\n" in status and "RANK" in variables:
            found[int(variables["RANK"])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def logged(output: Path) -> int:
    """The steps that the run has logged so far, in this start and those before."""
    path = output / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def last_checkpoint(output: Path, steps: int = STEPS) -> Path:
    """That of a run which came to its end; one that was stopped has an adapter too, so far."""
    return output / "checkpoints" / f"step-{steps:06d}"


def final(output: Path, steps: int = STEPS) -> dict[str, str]:
    """The hashes of the last checkpoint's weights and optimizer state, and of the adapter."""
    folder = last_checkpoint(output, steps)
    files = [*sorted(folder.rglob("*.safetensors")), output / "adapter" / "adapter_model.safetensors"]
    return {str(path.relative_to(output)): read_record(path).sha256 for path in files if path.exists()}


if __name__ == "__main__":
    main()
