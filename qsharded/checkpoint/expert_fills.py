"""Values for the experts of a model, packed or not, from whatever layout a checkpoint has.

Axes: E experts, N = out_features, K = in_features, G = blocks in a row, P = K/2.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from qsharded.checkpoint import fill_shards
from qsharded.checkpoint.expert_layouts import Layout, Shapes, Unit, is_of_experts, layout_of
from qsharded.checkpoint.row_chunks import RowChunk, WeightSource
from qsharded.quant import ops
from qsharded.quant.experts import ExpertLinears, PackedExperts
from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import double_quantize_experts
from qsharded.utils.sharding import RowRange, local, own_rows

AnyExperts = ExpertLinears | PackedExperts


def experts_in(model: nn.Module) -> Iterator[tuple[str, AnyExperts]]:
    """(name, module) of each projection of all experts of a layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AnyExperts))


def shapes_in_files(source: WeightSource, name: str, shape: tuple[int, ...]) -> Shapes:
    """What the files must hold for the model's tensor ``name``, [E, N, K] or a bias [E, N]."""
    assert is_of_experts(name)
    E, N, K = shape if len(shape) == 3 else (*shape, 1)
    return layout_of(source, name).shapes(N, K, E)


def packed_experts_in(model: nn.Module) -> Iterator[tuple[str, PackedExperts]]:
    """Those that are packed."""
    return ((name, experts) for name, experts in experts_in(model) if isinstance(experts, PackedExperts))


def fills(source: WeightSource, name: str, experts: AnyExperts) -> Iterator[fill_shards.Fill]:
    """What fills this rank's part of ``experts``, whose name in the checkpoint is ``name``."""
    yield RowsOfExperts(source, f"{name}.weight", experts.out_features, experts.in_features, _sink_of(experts))
    yield from bias_fills(source, name, experts)


def bias_fills(source: WeightSource, name: str, experts: AnyExperts) -> Iterator[fill_shards.Fill]:
    """What fills this rank's rows of their bias, where they have one."""
    if experts.bias is not None:
        own, rows, N = local(experts.bias).detach(), own_rows(experts.bias), experts.out_features
        yield RowsOfExperts(source, f"{name}.bias", N, 1, _PlainRows(own.view(-1, 1), rows.start * N))


class Sink(Protocol):
    """Where the rows of all experts go, in their order.

    Attributes:
        start, stop: the first of this rank's rows of E N, and that after the last.
    """

    start: int
    stop: int

    def put(self, first: int, rows_nK: Tensor) -> None:
        """The rows from ``first`` on, counted in all E N."""

    def finish(self, device: torch.device) -> None:
        """All of this rank's rows are there, and sound on every rank."""


def _sink_of(experts: AnyExperts) -> Sink:
    if isinstance(experts, PackedExperts):
        rows, sink = own_rows(experts.weight), fill_shards.LayerSink(experts)
        return ExpertPacking(experts.experts, experts.in_features, rows, experts.quant_format, sink)
    own, rows = local(experts.weight).detach(), own_rows(experts.weight)
    return _PlainRows(own.flatten(0, 1), rows.start * experts.out_features)


class RowsOfExperts:
    """This rank's rows of one projection of all experts, unit by unit, to a sink.

    Args:
        name: the model's, of the matrices [N, K] or of biases, where K is 1.
    """

    def __init__(self, source: WeightSource, name: str, N: int, K: int, sink: Sink) -> None:
        self._sink, self._finite = sink, fill_shards.FiniteCheck(name)
        self._units = iter(units := list(_units(layout_of(source, name), source, sink.start, sink.stop, N, K)))
        self.chunks = [chunk for unit in units for chunk in unit.chunks]
        self._unit: Unit | None = None
        self._held: list[Tensor] = []
        self._row = sink.start

    def take(self, chunk: RowChunk, values: Tensor) -> None:
        unit = self._unit = self._unit or next(self._units)
        is_last = len(self._held) == len(unit.chunks) - 1
        self._held.append(values if is_last else values.clone())  # good during this call alone
        if is_last:
            rows_nK = unit.make(self._held)
            self._unit, self._held = None, []
            self._finite.add(rows_nK)
            self._sink.put(self._row, rows_nK)
            self._row += rows_nK.shape[0]

    def check(self) -> None:
        self._finite.demand()

    def finish(self, device: torch.device) -> None:
        self._sink.finish(device)


def _units(layout: Layout, source: WeightSource, start: int, stop: int, N: int, K: int) -> Iterator[Unit]:
    """Of rows [start, stop) of all E N."""
    for e in range(start // N, -(-stop // N)):
        first, last = max(start - e * N, 0), min(stop - e * N, N)
        if first < last:
            yield from layout.units(source, e, first, last, N, K)


class _PlainRows:
    """Rows kept as they are stored, but for the dtype."""

    def __init__(self, target_RK: Tensor, start: int) -> None:
        self._target_RK, self.start, self.stop = target_RK, start, start + target_RK.shape[0]

    def put(self, first: int, rows_nK: Tensor) -> None:
        self._target_RK[first - self.start : first - self.start + rows_nK.shape[0]].copy_(rows_nK)

    def finish(self, device: torch.device) -> None:
        """Nothing is left to do."""


class ExpertPacking:
    """Rows quantized as they come, and each expert's absmax by itself at the end.

    Args:
        rows: this rank's, of E N.
        sink: where they go.
    """

    def __init__(
        self, experts: int, K: int, rows: RowRange, quant_format: QuantFormat, sink: fill_shards.PackedSink
    ) -> None:
        self._experts, self._K, self._rows, self._quant_format, self._sink = experts, K, rows, quant_format, sink
        self.start, self.stop = rows.start, rows.stop
        self._absmax: list[Tensor] = []

    def put(self, first: int, rows_nK: Tensor) -> None:
        codes_nP, absmax_nG = ops.nf4_quantize(rows_nK, self._quant_format)
        self._sink.put_codes(first, codes_nP)
        self._absmax.append(absmax_nG)

    def finish(self, device: torch.device) -> None:
        absmax, self._absmax = self._absmax, []
        empty = torch.empty(0, self._K // self._quant_format.block_size, dtype=torch.float32, device=device)
        absmax_RG = torch.cat([empty, *absmax])
        self._sink.put_absmax(double_quantize_experts(absmax_RG, self._experts, fill_shards.shared(self._rows)))
