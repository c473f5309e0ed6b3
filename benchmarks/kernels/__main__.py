"""Benchmark the kernels against this machine's limits, bf16 and other libraries.

    python -m benchmarks.kernels [--ops dequantize,linear] [--shapes llama3-8b] [--peers bitsandbytes,torchao] [--short]

Each contender must first give the right answer, against fp64. Then all are timed in turns, from a cold cache: median,
20th and 80th percentile. The limit is the time of the bytes (each once) at the speed of a large copy, or of the
arithmetic at that of a large matmul, both measured in the same run. Writes a record, and plots where matplotlib is
installed, into --out, under --name: by default one of its own, made of operations, device, date and commit. The exit
status is 1 where an answer of ours is wrong.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import ceilings, peers, plots, report, shapes
from benchmarks.kernels.case import Case
from benchmarks.kernels.context import Context, forget_weights
from benchmarks.kernels.measure import Row, measure
from benchmarks.kernels.ops import OPERATIONS
from benchmarks.record import write


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    device = torch.device(arguments.device)
    found, missing = peers.load(arguments.peers)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    limits = ceilings.measure(device, arguments.repeats)
    print(report.heading(limits))
    context = Context(device, tuple(found), arguments.short, arguments.rows)
    rows: list[Row] = []
    for case in all_cases(arguments, context):
        rows += measure(case, limits, device, arguments.repeats)
        print(report.table(case.label, rows[-len(case.contenders) :]), flush=True)
    save(arguments, limits, rows)
    sys.exit(any(row.problem and row.contender not in peers.NAMES for row in rows))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Comma-separated lists, checked against what there is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", type=names, default=list(OPERATIONS), help=", ".join(OPERATIONS))
    parser.add_argument("--shapes", type=names, help="models: " + ", ".join(shapes.SHAPES) + " (default: llama3-8b)")
    parser.add_argument("--peers", type=names, default=[], help="libraries beside ours: " + ", ".join(peers.NAMES))
    parser.add_argument("--rows", type=numbers, help="M, rows of the activations, such as 1,16,256")
    parser.add_argument("--short", action="store_true", help="few shapes and few repeats")
    parser.add_argument("--repeats", type=int, help="timed calls of each (default 50; 10 with --short)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder for results")
    parser.add_argument(
        "--name", type=file_name, help="of the record and its plots; what has it already is overwritten"
    )
    arguments = parser.parse_args(argv)
    for op in arguments.ops:
        if op not in OPERATIONS:
            parser.error(f"--ops: {op!r} is none of {', '.join(OPERATIONS)}")
    try:
        shapes.of_models(arguments.shapes or [])
        peers.check(arguments.peers)
    except ValueError as error:
        parser.error(str(error))
    arguments.repeats = arguments.repeats or (10 if arguments.short else 50)
    return arguments


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def file_name(text: str) -> str:
    """A name without folders: they are --out's."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a file's name, without folder or .json: see --out")
    return text.removesuffix(".json")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in names(text))


def all_cases(arguments: argparse.Namespace, context: Context) -> Iterator[Case]:
    """Every operation on every shape."""
    if arguments.shapes or not arguments.short:
        chosen = shapes.of_models(arguments.shapes or ["llama3-8b"])
    else:
        chosen = shapes.SHORT[context.device.type]
    for shape in chosen:
        for op in arguments.ops:
            yield from OPERATIONS[op](context, shape)
        forget_weights()


def save(arguments: argparse.Namespace, limits: ceilings.Ceilings, rows: list[Row]) -> None:
    """The record, and plots where they can be drawn. Plots of an older record of the name go: they are not its own."""
    device = torch.device(arguments.device)
    record = report.record("benchmarks.kernels", device, limits, arguments.repeats, rows)
    name = arguments.name or report.free_name(arguments.out, "-".join(arguments.ops), record)
    path = write(arguments.out / f"{name}.json", record)
    print(f"\nresults: {path}")
    plots.remove(arguments.out, name)
    try:
        drawn: list[Any] = plots.save(record, arguments.out, name)
    except ImportError:
        print("no plots: matplotlib is not installed")
    else:
        print("plots:", *drawn)


if __name__ == "__main__":
    main()
