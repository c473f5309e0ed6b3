"""Every packed layer of a checkpoint rounded for its inputs, one decoder layer after the other.

A layer's inputs are those that the quantized layers before it give: each one makes up for some of what is behind it.

Axes: N = out_features, K = in_features.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from qsharded.calibration.compensated import ColumnOrder, compensated, searched
from qsharded.calibration.layer_inputs import LayerInputs
from qsharded.calibration.layer_store import LayerStore
from qsharded.calibration.layer_walk import LayerWalk
from qsharded.calibration.second_moments import SecondMoments
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant import formats, ops
from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import SharedRows
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils import collectives
from qsharded.utils.sharding import gathered_rows, rows_of_rank

Method = Literal["compensated", "search"]


@dataclass(frozen=True)
class Calibration:
    """How weights are rounded.

    Attributes:
        method: "compensated", or "search" of scales alone.
        quant_format: to which format.
        group: the ranks that do it together: each takes some of the calibration rows and of every weight's rows.
    """

    method: Method
    quant_format: QuantFormat
    group: dist.ProcessGroup | None = None


def calibrate(
    walk: LayerWalk,
    source: SafetensorsFolder,
    packed: Collection[str],
    how: Calibration,
    store: LayerStore,
    device: torch.device,
    *,
    shows_progress: bool = True,
) -> None:
    """Fill ``store`` with the weights in ``packed`` that are of the decoder's layers. All ranks call this.

    Raises:
        ValueError: a weight or an input that is not finite.
    """
    for number in walk.in_turn("calibrating", shows_progress=shows_progress):
        linears = {name: linear for name, linear in walk.linears(number).items() if name in packed}
        if not _is_done(store, number, how.group):
            weights = dict(_rounded(walk, number, linears, source, how))
            if collectives.rank(how.group) == 0:
                store.put(number, weights)
            collectives.barrier(how.group)
        for name, weight in store.get(number, device).items():
            linear = linears[name]
            linear.weight.data = ops.nf4_dequantize(weight, linear.weight.dtype)
        walk.run(number, keep=True)


def _is_done(store: LayerStore, layer: int, group: dist.ProcessGroup | None) -> bool:
    return collectives.broadcast_object(store.has(layer), group)


def _rounded(
    walk: LayerWalk, number: int, linears: dict[str, nn.Linear], source: SafetensorsFolder, how: Calibration
) -> Iterator[tuple[str, PackedWeight]]:
    inputs = LayerInputs(linears)
    with inputs.watched():
        walk.run(number, keep=False)
    for moments, names in inputs.groups():
        moments.agree(how.group)
        yield from _round_group(moments, {name: linears[name] for name in names}, source, how)


def _round_group(
    moments: SecondMoments, linears: dict[str, nn.Linear], source: SafetensorsFolder, how: Calibration
) -> Iterator[tuple[str, PackedWeight]]:
    """Weights that see the same inputs. With fewer tokens than columns the moments say too little of how columns go
    together: then their diagonal alone is used, and with no token no column counts for more than another."""
    first = next(iter(linears))
    tokens = moments.tokens
    damped = moments.damped(first)
    by_search = how.method == "search" or tokens < damped.H_KK.shape[0]
    order = None if by_search else ColumnOrder.of(damped, how.quant_format.block_size)
    for name in linears:
        N = source.shape(name)[0]
        start, stop = rows_of_rank(N, collectives.size(how.group), collectives.rank(how.group))
        weight_NK = source.rows(name, start, stop).to(damped.H_KK.device)
        if start < stop:
            formats.check_weight(weight_NK, how.quant_format, name)
        rows = SharedRows(start, N, partial(collectives.all_reduce, group=how.group))
        if order is None:
            own = searched(weight_NK, damped.importance_K, how.quant_format, rows)
        else:
            own = compensated(weight_NK, damped.importance_K, order, how.quant_format, rows)
        yield name, _whole(own, N, how.group)


def _whole(own: PackedWeight, N: int, group: dist.ProcessGroup | None) -> PackedWeight:
    """The weight of which each rank has some rows."""
    codes, absmax = (gathered_rows(part, N, group) for part in (own.codes, own.absmax))
    return PackedWeight(codes, absmax, own.absmax_scales, own.absmax_offset, own.quant_format)
