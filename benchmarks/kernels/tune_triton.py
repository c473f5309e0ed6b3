"""Time the products in Triton, tile by tile, beside bf16, decoding first, our CUDA kernel and others; find the best.

    python -m benchmarks.kernels.tune_triton [--seconds 100] [--rows 1,4,16] [--peers bitsandbytes] [--write]

The record lands in --out. With --write ``qsharded_kernels/triton_tiles.json`` gets this card's tiles in place of older
ones. Every tile meets the largest weight first; then the fastest few, cut into several numbers of programs, meet all
weights. What would begin after --seconds is left out, and named.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.kernels import ceilings, peers, report, triton_table
from benchmarks.kernels.__main__ import file_name, names, numbers
from benchmarks.kernels.context import forget_weights, pack
from benchmarks.kernels.measure import Row, measure
from benchmarks.kernels.triton_cases import MakeCase, Tile, input_grad_case, linear_case, tile_name
from benchmarks.record import write
from qsharded_kernels.triton_decode import DECODERS
from qsharded_kernels.triton_tiles import InputGradTile, LinearTile

MODULE = "benchmarks.kernels.tune_triton"
SHAPES = [(28672, 8192), (8192, 8192), (14336, 4096), (1024, 4096)]
FINALISTS = 3
PROGRAMS = (2, 4, 8, 12)  # for each SM

_ROWS_AND_WARPS = [(64, 4), (32, 2), (128, 8), (128, 4), (64, 2)]
LINEAR: list[Tile] = [
    LinearTile(rows, warps, stages, decoder=decoder)
    for decoder, stages in [*product(DECODERS, (2,)), ("permute", 1), ("permute", 3), ("gather", 1)]
    for rows, warps in _ROWS_AND_WARPS
]
INPUT_GRAD: list[Tile] = [
    InputGradTile(rows, blocks, warps, stages)
    for stages in (2, 1)
    for rows, blocks, warps in [(32, 4, 4), (64, 2, 4), (32, 2, 4), (64, 4, 8)]
]


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    device = torch.device("cuda", torch.cuda.current_device())
    found, missing = peers.load(arguments.peers)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    tuner = Tuner(device, SHAPES, arguments.repeats, time.monotonic() + arguments.seconds)
    print(report.heading(tuner.limits))
    for make, tiles in ((linear_case, LINEAR), (input_grad_case, INPUT_GRAD)):
        for rows in tuner.tune(make, tiles, arguments.rows, found):
            fastest = sorted(rows, key=lambda row: row.times.median if row.times else 0)
            print(report.table(f"{rows[0].op} {rows[0].N}x{rows[0].K} M={rows[0].M}", fastest), flush=True)
    record = report.record(MODULE, device, tuner.limits, arguments.repeats, tuner.rows) | {"left_out": tuner.left_out}
    name = arguments.name or report.free_name(arguments.out, "triton-tiles", record)
    print(f"\nrecord: {write(arguments.out / f'{name}.json', record)}; left out: {tuner.left_out or 'nothing'}")
    if arguments.write:
        print(f"table: {triton_table.write(triton_table.card(tuner.rows, tuner.tiles), device, MODULE)}")
    sys.exit(any(row.problem and row.contender not in peers.NAMES for row in tuner.rows))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=100, help="after which nothing more is begun")
    parser.add_argument("--rows", type=numbers, default=(1, 4, 16), help="M, such as 1,4,16,32,64")
    parser.add_argument("--peers", type=names, default=[], help="libraries beside ours: " + ", ".join(peers.NAMES))
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder for the record")
    parser.add_argument("--name", type=file_name, help="of the record")
    parser.add_argument("--write", action="store_true", help="write the table that the kernels read")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here, and elsewhere no tile is faster than another")
    return arguments


class Tuner:
    """Times tiles on ``shapes``, the largest first, until ``deadline``. ``rows``: of all that was timed; ``tiles``: by
    the contender's name; ``left_out``: for want of time."""

    def __init__(self, device: torch.device, shapes: list[tuple[int, int]], repeats: int, deadline: float) -> None:
        self.device, self.shapes, self.repeats, self.deadline = device, shapes, repeats, deadline
        self.limits = ceilings.measure(device, repeats)
        self.rows: list[Row] = []
        self.tiles: dict[str, Tile] = {}
        self.left_out: list[str] = []

    def tune(
        self, make: MakeCase, tiles: list[Tile], numbers_of_rows: tuple[int, ...], found: list[peers.Peer]
    ) -> Iterator[list[Row]]:
        """Every tile on the largest weight, for the fewest rows and the most; the best of these on all."""
        tried = []
        for M in sorted({min(numbers_of_rows), max(numbers_of_rows)}):
            tried.append(self._timed(make, self.shapes[0], M, tiles, []))
            yield from filter(None, tried[-1:])
        finalists = dict.fromkeys(tile for rows in tried for tile in self._fastest(rows))
        cut = [replace(tile, programs_per_sm=programs) for tile in finalists for programs in PROGRAMS]
        for shape in self.shapes:
            for M in numbers_of_rows:
                yield from filter(None, [self._timed(make, shape, M, cut, found)])
            forget_weights()

    def _timed(
        self, make: MakeCase, shape: tuple[int, int], M: int, tiles: list[Tile], found: list[peers.Peer]
    ) -> list[Row]:
        if time.monotonic() > self.deadline or not tiles:
            self.left_out.append(f"{make.__name__} {shape[0]}x{shape[1]} M={M}")
            return []
        self.tiles |= {tile_name(tile): tile for tile in tiles}
        case = make(pack(shape, self.device), M, tiles, found)
        rows = measure(case, self.limits, self.device, self.repeats)
        self.rows += rows
        return rows

    def _fastest(self, rows: list[Row]) -> list[Tile]:
        timed = sorted((row.times.median, row.contender) for row in rows if row.times and row.contender in self.tiles)
        return [self.tiles[name] for _, name in timed[:FINALISTS]]


if __name__ == "__main__":
    main()
