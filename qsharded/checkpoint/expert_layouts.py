"""How checkpoints store the experts of a layer: where the rows of one projection of one expert lie, and what they need.

The model has, for gate, up and down, one module of all experts: `P.experts.gate_proj` and so on. Files have

    apart        P.experts.3.gate_proj.weight [J, D], ... a tensor an expert
    stacked      the same under other names, as transformers' rules give them where its code runs the model
    joined       P.experts.gate_up_proj [E, 2J, D], gate's rows before up's; P.experts.down_proj [E, D, J]
    gpt-oss      P.experts.gate_up_proj [E, D, 2J], gate and up in alternate columns; P.experts.down_proj [E, J, D];
                 biases P.experts.gate_up_proj_bias [E, 2J] and P.experts.down_proj_bias [E, D]
    MXFP4        gpt-oss's matrices in 4 bits: P.experts.gate_up_proj_blocks uint8 [E, 2J, D/32, 16] with gate and up in
                 alternate rows, ..._scales uint8 [E, 2J, D/32]; its biases
    our own      P.experts.gate_proj.weight [E J, D]: random weights; packed, see :mod:`packed_format`

Whatever the layout, a run of rows is read in pieces of a bounded size, and what is turned around (gpt-oss) is one
expert's matrix at a time. So no rank holds more than one expert of a layer in 16 bits, whose bytes when it is quantized
depend on its values alone.

Axes: E experts, N = out_features, K = in_features, J intermediate size, D hidden size.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from qsharded.checkpoint.mxfp4 import BLOCKS, SCALES, decode_mxfp4
from qsharded.checkpoint.row_chunks import RowChunk, WeightSource, row_chunks_of
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant.experts import DOWN, GATE_UP

_NAME = re.compile(r"(?P<experts>.*\.experts)\.(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)")
_GATE, _UP = 0, 1

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Unit:
    """Pieces of a checkpoint that make rows of one expert's matrix.

    Attributes:
        chunks: what is read, in this order.
        make: from their flat values to rows [n, K].
    """

    chunks: Sequence[RowChunk]
    make: Callable[[list[Tensor]], Tensor]


class Layout(Protocol):
    """How one projection of all experts is stored."""

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        """The tensors in the files that hold it, among them those that it shares with another projection."""

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        """What makes rows [first, last) of expert e's matrix [N, K]; of a bias of one column K = 1."""

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(expert, its matrix [N, K]) of those in the tensor ``name``: views, which may be written to."""


def is_of_experts(name: str) -> bool:
    """Whether a tensor of the model is a projection of all experts of a layer, or its bias."""
    return _NAME.fullmatch(name) is not None


def layout_of(source: WeightSource, name: str) -> Layout:
    """How the files hold the model's tensor ``name``.

    Raises:
        ValueError: they hold none of the layouts that are known.
    """
    matched = _NAME.fullmatch(name)
    assert matched is not None
    experts, part, kind = matched["experts"], matched["part"], matched["kind"]
    if not isinstance(source, SafetensorsFolder):
        return _Own(name)
    if source.holds(name):
        return _OwnPacked(name)
    joined = f"{experts}.{DOWN if part == 'down' else GATE_UP}"
    half = {"gate": _GATE, "up": _UP, "down": None}[part]
    if kind == "bias":
        return _Interleaved(f"{joined}_bias", half)
    stacked = source.stacked.get(joined, [[]])
    if len(stacked[0]) == _parts(half):
        return _Stacked(joined, [parts[half or 0] for parts in stacked])
    if source.holds(f"{experts}.0.{part}_proj.weight"):
        return _Apart(partial("{}.{}.{}".format, experts), f"{part}_proj.weight")
    if source.holds(joined + BLOCKS):
        return _Mxfp4(joined, half)
    if source.holds(f"{joined}_bias"):  # gpt-oss alone has biases, and turns its matrices around
        return _Turned(joined, half)
    if source.holds(joined):
        return _Joined(joined, half)
    raise ValueError(
        f"{source.folder} lacks {experts}.0.{part}_proj.weight and {joined}: the experts are stored otherwise"
    )


def _rows_of(source: WeightSource, name: str, start: int, stop: int, K: int) -> Iterator[Unit]:
    """Rows that need nothing but to be read."""
    for chunk in row_chunks_of(source, name, start, stop, K * source.dtype(name).itemsize):
        yield Unit([chunk], lambda values: values[0].view(-1, K))


@dataclass(frozen=True)
class _Own:
    name: str

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        return {self.name: (E * N, K)}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        yield from _rows_of(source, self.name, e * N + first, e * N + last, K)

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        raise AssertionError("random weights are not merged")


@dataclass(frozen=True)
class _OwnPacked(_Own):
    def shapes(self, N: int, K: int, E: int) -> Shapes:
        return {self.name: (E, N, K)}


@dataclass(frozen=True)
class _Apart:
    name_of: Callable[[int, str], str]
    ending: str

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        return {self.name_of(e, self.ending): (N, K) for e in range(E)}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        yield from _rows_of(source, self.name_of(e, self.ending), first, last, K)

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield int(name.removesuffix(f".{self.ending}").rpartition(".")[2]), stored


@dataclass(frozen=True)
class _Stacked:
    """Attributes:
    name: of the tensor that transformers makes of them.
    names: of each expert's tensor.
    """

    name: str
    names: Sequence[str]

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        if len(self.names) != E:
            raise ValueError(other_count(self.name, self.names, E))
        return {name: (N, K) for name in self.names}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        yield from _rows_of(source, self.names[e], first, last, K)

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield self.names.index(name), stored


def other_count(name: str, experts: Sequence[str], E: int) -> str:
    """What is wrong with the tensor ``name`` of a model, stored as so many ``experts``."""
    return f"{name} is stacked of {len(experts)} experts ({experts[0]} ...), config.json asks for {E}"


@dataclass(frozen=True)
class _Joined:
    name: str
    half: int | None

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        return {self.name: (E, N * _parts(self.half), K)}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        start = e * N * _parts(self.half) + N * (self.half or 0)
        yield from _rows_of(source, self.name, start + first, start + last, K)

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        for e, rows in enumerate(stored):
            yield e, rows if self.half is None else rows.chunk(2)[self.half]


@dataclass(frozen=True)
class _Interleaved:
    """Biases: E rows of N values, or of 2N for gate and up in turn."""

    name: str
    half: int | None

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        return {self.name: (E, N * _parts(self.half))}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        row_bytes = N * _parts(self.half) * source.dtype(self.name).itemsize
        chunks = row_chunks_of(source, self.name, e, e + 1, row_bytes)
        yield Unit(chunks, lambda values: _alternate(values[0].view(N * _parts(self.half), 1), self.half)[first:last])

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        raise AssertionError("biases are not merged")


@dataclass(frozen=True)
class _Turned:
    """Matrices [K, N] or [K, 2N], gate and up in alternate columns: an expert's is read whole."""

    name: str
    half: int | None

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        return {self.name: (E, K, N * _parts(self.half))}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        columns = N * _parts(self.half)
        row_bytes = columns * source.dtype(self.name).itemsize
        chunks = row_chunks_of(source, self.name, e * K, (e + 1) * K, row_bytes)
        yield Unit(chunks, lambda values: _turned(values, columns, self.half)[first:last])

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        for e, turned in enumerate(stored):
            yield e, _alternate(turned.T, self.half)


@dataclass(frozen=True)
class _Mxfp4:
    """Blocks of 32 values that share a scale, a power of two; gate and up in alternate rows."""

    name: str
    half: int | None

    def shapes(self, N: int, K: int, E: int) -> Shapes:
        rows, G = N * _parts(self.half), K // 32
        return {self.name + BLOCKS: (E, rows, G, 16), self.name + SCALES: (E, rows, G)}

    def units(self, source: WeightSource, e: int, first: int, last: int, N: int, K: int) -> Iterator[Unit]:
        parts, G = _parts(self.half), K // 32
        start, stop = ((e * N + row) * parts for row in (first, last))
        step = source.rows_at_once(G * 16) // parts * parts or parts
        for a in range(start, stop, step):
            b = min(a + step, stop)
            scales = RowChunk(self.name + SCALES, a, b, G)
            yield Unit(
                [scales, RowChunk(self.name + BLOCKS, a, b, G * 16)],
                lambda values: _alternate(decode_mxfp4(values[1].view(-1, G, 16), values[0].view(-1, G)), self.half),
            )

    def matrices(self, name: str, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        raise AssertionError("such checkpoints are not merged")


def _parts(half: int | None) -> int:
    """How many projections share the tensor."""
    return 1 if half is None else 2


def _alternate(rows: Tensor, half: int | None) -> Tensor:
    return rows if half is None else rows[half::2]


def _turned(values: list[Tensor], columns: int, half: int | None) -> Tensor:
    return _alternate(torch.cat(values).view(-1, columns).T, half).contiguous()
