"""Find up to how many tokens the fused product beats dequantizing W and multiplying then, and write it for this card.

    python -m benchmarks.kernels.fused_rows [--shapes llama3-8b,llama3-70b] [--repeats 50]

``qsharded_kernels/fused_rows.json`` gets this card's figures in place of older ones, and the record of the run lands in
--out. Weights of one size share a figure: the lowest among the shapes measured.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import ceilings, report, shapes
from benchmarks.kernels.__main__ import names
from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.context import Packed, forget_weights, pack
from benchmarks.kernels.measure import Row, measure
from benchmarks.kernels.ops.linear import TOLERANCE
from benchmarks.record import command, environment
from benchmarks.record import write as record_at
from qsharded.quant import backends
from qsharded.quant.own_kernels import CompiledCuda
from qsharded_kernels import fused_rows

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512)
MODULE = "benchmarks.kernels.fused_rows"
FUSED, DEQUANTIZED = "fused", "dequantized"


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    device = torch.device("cuda", torch.cuda.current_device())
    limits = ceilings.measure(device, arguments.repeats)
    rows = [row for case in all_cases(arguments.shapes, device) for row in timed(case, limits, arguments.repeats)]
    record = report.record(MODULE, device, limits, arguments.repeats, rows)
    record_path = record_at(arguments.out / f"{report.free_name(arguments.out, 'fused-rows', record)}.json", record)
    print(f"\nrecord: {record_path}")
    write(most_rows(rows), device)
    print(f"\n{fused_rows.PATH}: {most_rows(rows)}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Checked against the shapes there are, and against what this machine has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names, default=list(shapes.SHAPES), help="models; all by default")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder for the record")
    arguments = parser.parse_args(argv)
    try:
        shapes.of_models(arguments.shapes)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here, and elsewhere nothing is fused")
    return arguments


def all_cases(models: list[str], device: torch.device) -> Iterator[Case]:
    """Each shape at each number of rows."""
    for shape in shapes.of_models(models):
        packed = pack(shape, device)
        dequantized = packed.dequantized()
        for M in ROWS:
            x = torch.randn(M, shape[1], device=device).bfloat16()
            yield packed.product("linear", x.double() @ dequantized.T, contenders(packed, x), DEQUANTIZED)
        forget_weights()


def contenders(packed: Packed, x: Tensor) -> list[Contender]:
    def dequantize_first() -> Tensor:
        return F.linear(x, backends.dequantize(packed.packed(), x.dtype))

    fused = partial(CompiledCuda().linear, x, packed.packed(), None)
    return [Contender(FUSED, fused, TOLERANCE), Contender(DEQUANTIZED, dequantize_first, TOLERANCE)]


def timed(case: Case, limits: ceilings.Ceilings, repeats: int) -> list[Row]:
    rows = measure(case, limits, case.expected.device, repeats)
    print(report.table(case.label, rows), flush=True)
    problems = [row.problem for row in rows if row.problem]
    if problems:
        raise SystemExit(f"{case.label}: {problems[0]}")
    return rows


def most_rows(rows: list[Row]) -> fused_rows.MostRows:
    """By the log2 of the number of weights; sizes that agree with the one before are left out."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for N, K in dict.fromkeys((row.N, row.K) for row in rows):
        by_size[(N * K).bit_length() - 1].append(last_win([row for row in rows if (row.N, row.K) == (N, K)]))
    found = {size: min(by_size[size]) for size in sorted(by_size)}
    before = [None, *found.values()]
    return {size: most for (size, most), last in zip(found.items(), before, strict=False) if most != last}


def last_win(rows: list[Row]) -> int:
    """The most rows of x up to which the fused product is the faster at every number measured; 0 where at none."""
    fused = sorted((row for row in rows if row.contender == FUSED), key=lambda row: row.M or 0)
    wins = takewhile(lambda row: row.speedup is not None and row.speedup >= 1, fused)
    return max((row.M or 0 for row in wins), default=0)


def write(most: fused_rows.MostRows, device: torch.device) -> None:
    """This card's figures into the table, in place of older ones."""
    made = {key: value for key, value in environment().items() if key in ("gpu", "date", "commit")}
    card = made | {"capability": fused_rows.capability(device), "command": command(MODULE)}
    others = [other for other in fused_rows.read() if other["gpu"] != card["gpu"]]
    cards = sorted([*others, card | {"most_rows": most}], key=lambda card: card["gpu"])
    fused_rows.PATH.write_text(json.dumps({"cards": cards}, indent=1) + "\n")


if __name__ == "__main__":
    main()
