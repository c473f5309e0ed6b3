"""Time QLoRA steps, ours and other libraries', and keep a record with a plot.

    python -m benchmarks.train_step [--shape llama3-8b --rows 4 --length 2048 --checkpointing full]
    python -m benchmarks.train_step --suite h200 --peers unsloth transformers --record FILE

Each runs in a process of its own. tokens/s are the rows' tokens over the median of a step from one wait for the GPU to
the next. MFU: the step's arithmetic without recomputation (``Case.flops``) over its time and the card's 989 TFLOP/s.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import SHAPES
from benchmarks.record import command, environment, write
from benchmarks.train_step import peers, plot
from benchmarks.train_step.case import CHECKPOINTING, PEAK_BF16_FLOPS, Case, suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=1, help="in each row")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="full")
    parser.add_argument("--model-code", choices=("auto", "native", "transformers"), default="auto")
    parser.add_argument("--lora-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--memory-gib", type=float, help="of the GPU that --checkpointing auto is to fit")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="of the suite, these")
    parser.add_argument("--suite", choices=("h200",), help="the cases that the README cites, in place of one")
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, default=[])
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here, and these shapes are for one")
    shape = SHAPES[given.shape]
    names = ("rows", "length", "documents", "checkpointing", "lora_dtype", "memory_gib", "model_code")
    one = Case(given.shape, shape, **{name: getattr(given, name) for name in names})
    cases = [case for case in suite(shape) if case.name in given.cases or not given.cases] if given.suite else [one]
    rows = []
    with tempfile.TemporaryDirectory() as models:
        for case, who in itertools.product(cases, ("qsharded", *given.peers)):
            rows.append({"case": case.name, "who": who} | figures(case, run(who, case, models)))
            print(json.dumps(rows[-1]), flush=True)
    if given.record:
        record = environment() | {"command": command("benchmarks.train_step"), "shape": given.shape, "rows": rows}
        write(given.record, record)
        plot.save(rows, given.record.with_suffix(".png"), plot.title(record))


def run(who: str, case: Case, models: str) -> dict[str, Any]:
    """What a process of its own measured; for one that fails, its last line.

    Args:
        models: a folder for the peers' checkpoints, which serve several cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "case.json"), Path(folder, "result.json")
        given.write_text(json.dumps(case.to_json()))
        if who == "qsharded":
            line, place = [sys.executable, "-m", "benchmarks.train_step.ours", str(given), str(result)], None
        else:
            line, place = [sys.executable, "-P", peers.__file__, who, str(given), str(result), models], folder
        ended = subprocess.run(line, cwd=place, capture_output=True, text=True, check=False)
        if ended.returncode:
            return {"failed": (ended.stderr.strip().splitlines() or ["no message"])[-1]}
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def figures(case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """With tokens/s, MFU, and the share of the time in which the GPU was busy."""
    if "failed" in measured:
        return measured
    seconds, tokens = measured["step_ms"] / 1e3, measured.get("tokens", case.tokens)
    added = {"tokens_per_second": tokens / seconds}
    if tokens == case.tokens:
        added["mfu"] = case.flops() / seconds / PEAK_BF16_FLOPS
    if "busy_ms" in measured:
        added["busy_share"] = min(1.0, measured["busy_ms"] / measured["step_ms"])
    return measured | added


if __name__ == "__main__":
    main()
