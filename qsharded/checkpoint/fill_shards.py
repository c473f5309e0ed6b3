"""Values for a model's parameters: each fill names the rows that it needs and takes them chunk by chunk, in order.

Axes: N = this rank's rows, K = in_features, G = blocks in a row.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from qsharded.checkpoint.row_chunks import RowChunk, WeightSource, row_chunks_of
from qsharded.distributed.agreement import Groups, refused_by_all
from qsharded.quant import formats, ops
from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import SharedRows, double_quantize
from qsharded.quant.packed_module import PackedModule
from qsharded.quant.packed_weight import QuantizedAbsmax, pad_absmax
from qsharded.utils import collectives
from qsharded.utils.progress_bar import ProgressBar
from qsharded.utils.sharding import RowRange, local, own_rows


class Fill(Protocol):
    """One parameter, or one packed layer, or one tensor of a file that is written."""

    @property
    def chunks(self) -> Sequence[RowChunk]:
        """What it takes, in this order."""

    def take(self, chunk: RowChunk, values: Tensor) -> None:
        """The next of the chunks, in the dtype it is stored in, flat; good during this call alone."""

    def check(self) -> None:
        """All chunks were taken. Raise ValueError where they are not sound; the other ranks learn of it."""

    def finish(self, device: torch.device) -> None:
        """All chunks are sound on every rank, on ``device``. Ranks that have none come here too."""


def run(
    fills: Iterable[Fill],
    source: WeightSource,
    device: torch.device,
    groups: Groups = (),
    bar: ProgressBar | None = None,
) -> None:
    """Carry out ``fills`` in order on ``device``, reading ahead meanwhile.

    Args:
        groups: those of the ranks that carry out the same fills, each its own rows.
        bar: shows the bytes read.

    Raises:
        ValueError, OSError: what is read is damaged, or cannot be read: alike on all these ranks.
    """
    fills = list(fills)
    with closing(source.stream([chunk for fill in fills for chunk in fill.chunks], device)) as stream:
        take_all(fills, source, stream, device, groups, bar)


def bytes_of(fills: Iterable[Fill]) -> int:
    """What this rank reads for ``fills``."""
    return sum(chunk.nbytes for fill in fills for chunk in fill.chunks)


def shown_bar(title: str, nbytes: int) -> AbstractContextManager[ProgressBar | None]:
    """A bar of so many bytes on the first rank, whose part is about as large as the others'; elsewhere none."""
    is_first = collectives.rank(collectives.every_rank()) == 0
    return ProgressBar(title, nbytes) if is_first else nullcontext()


@torch.no_grad()
def take_all(
    fills: Iterable[Fill],
    source: WeightSource,
    stream: Iterator[Tensor],
    device: torch.device,
    groups: Groups = (),
    bar: ProgressBar | None = None,
) -> None:
    """Give ``fills`` their chunks out of ``stream``, which has the bytes of all in their order."""
    for fill in fills:
        with refused_by_all(groups, device):
            for chunk in fill.chunks:
                fill.take(chunk, next(stream).view(-1).view(source.dtype(chunk.name)))
                if bar is not None:
                    bar.advance(chunk.nbytes)
            fill.check()
        fill.finish(device)


class RowsFill:
    """Rows that are kept as they are stored, but for the dtype.

    Args:
        target: this rank's rows, from row ``first`` on of the stored tensor. uint8 takes the bytes of any dtype, and
            any dtype takes stored uint8 as its bytes.
    """

    def __init__(self, source: WeightSource, name: str, target: Tensor, first: int = 0) -> None:
        self._target, self._first, self._finite = target, first, FiniteCheck(name)
        self._takes_bytes = torch.uint8 in (target.dtype, source.dtype(name))
        size = target.itemsize if self._takes_bytes else source.dtype(name).itemsize
        row_bytes = math.prod(target.shape[1:]) * size
        self.chunks = row_chunks_of(source, name, first, first + target.shape[0], row_bytes)

    def take(self, chunk: RowChunk, values: Tensor) -> None:
        if self._takes_bytes:
            values = values.view(self._target.dtype)
        self._finite.add(values)
        target = self._target[chunk.start - self._first : chunk.stop - self._first]
        target.copy_(values.view(target.shape))

    def check(self) -> None:
        self._finite.demand()

    def finish(self, device: torch.device) -> None:
        """Nothing is left to do."""


class PackedSink(Protocol):
    """Where a weight goes that is quantized."""

    def put_codes(self, first: int, codes_NP: Tensor) -> None:
        """Codes of the rows from ``first`` on, counted in the whole weight."""

    def put_absmax(self, absmax: QuantizedAbsmax) -> None:
        """That of all of this rank's rows."""


class QuantizingFill:
    """A weight from 16 or 32 bits to a sink: each chunk is quantized as it comes; scales and offset, which span ranks,
    are agreed on at the end, exactly.

    Args:
        K: in_features.
        rows: this rank's.
        quant_format: to quantize to.
    """

    def __init__(
        self, source: WeightSource, name: str, K: int, rows: RowRange, quant_format: QuantFormat, sink: PackedSink
    ) -> None:
        self._K, self._rows, self._quant_format, self._sink = K, rows, quant_format, sink
        self._finite = FiniteCheck(name)
        self._absmax: list[Tensor] = []
        self.chunks = row_chunks_of(source, name, rows.start, rows.stop, K * source.dtype(name).itemsize)

    def take(self, chunk: RowChunk, values: Tensor) -> None:
        self._finite.add(values)
        codes_NP, absmax_NG = ops.nf4_quantize(values.view(-1, self._K), self._quant_format)
        self._sink.put_codes(chunk.start, codes_NP)
        self._absmax.append(absmax_NG)

    def check(self) -> None:
        self._finite.demand()

    def finish(self, device: torch.device) -> None:
        absmax, self._absmax = self._absmax, []
        empty = torch.empty(0, self._K // self._quant_format.block_size, dtype=torch.float32, device=device)
        self._sink.put_absmax(double_quantize(torch.cat([empty, *absmax]), shared(self._rows)))


class LayerSink:
    """A packed layer, or experts, sharded or whole."""

    def __init__(self, layer: PackedModule) -> None:
        self._layer = layer
        self._first = own_rows(layer.weight).start
        self._codes_NP = local(layer.weight).view(torch.uint8)

    def put_codes(self, first: int, codes_NP: Tensor) -> None:
        first -= self._first
        self._codes_NP[first : first + codes_NP.shape[0]].copy_(codes_NP)

    def put_absmax(self, absmax: QuantizedAbsmax) -> None:
        layer = self._layer
        assert layer.weight_absmax_scales is not None
        assert layer.weight_absmax_offset is not None
        local(layer.weight_absmax).view(torch.uint8).copy_(pad_absmax(absmax.codes))
        layer.weight_absmax_scales.copy_(absmax.scales)
        layer.weight_absmax_offset.copy_(absmax.offset)


def shared(rows: RowRange) -> SharedRows:
    """This rank's rows, with the way in which its ranks agree on scales."""
    return SharedRows(rows.start, rows.total, partial(collectives.all_reduce, group=rows.group))


class FiniteCheck:
    """Whether all of a tensor is finite, asked of the device once: asking of each chunk would stop the GPU for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._all: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Look at these too; bytes and codes always are, and so are the rows of a rank that has none."""
        if values.is_floating_point() and values.numel():
            finite = formats.all_finite(values)
            self._all = finite if self._all is None else self._all & finite

    def demand(self) -> None:
        """Raise ValueError unless all that was looked at, on this rank, is finite."""
        if self._all is not None:
            formats.refuse_not_finite(self._all, self._name)
