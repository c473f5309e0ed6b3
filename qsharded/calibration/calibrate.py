"""Every packed layer of a checkpoint rounded for its inputs, one decoder layer after the other.

A layer's inputs are those that the quantized layers before it give: each one makes up for some of what is behind it.

Axes: N = out_features, K = in_features.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from qsharded.calibration.compensated import InputsRounding
from qsharded.calibration.expert_inputs import ExpertInputs
from qsharded.calibration.expert_rounding import ExpertRounding
from qsharded.calibration.layer_inputs import LayerInputs
from qsharded.calibration.layer_store import LayerStore
from qsharded.calibration.layer_walk import LayerWalk
from qsharded.calibration.method import Calibration
from qsharded.calibration.second_moments import SecondMoments
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant import formats, ops
from qsharded.quant.experts import AnyPackedWeight, ExpertLinears
from qsharded.quant.pack_weight import SharedRows
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils import collectives
from qsharded.utils.sharding import gathered_rows, rows_of_rank


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
    """Fill ``store`` with the decoder's experts, and with those of its weights that are in ``packed``. All ranks call
    this.

    Raises:
        ValueError: a weight or an input that is not finite.
    """
    for number in walk.in_turn("calibrating", shows_progress=shows_progress):
        linears = {name: linear for name, linear in walk.linears(number).items() if name in packed}
        experts = walk.expert_linears(number)
        if not _is_done(store, number, how.group):
            weights: dict[str, AnyPackedWeight] = dict(_rounded(walk, number, linears, source, how))
            _hold(linears, experts, weights)
            of_experts, counts = _rounded_experts(walk, number, how)
            if collectives.rank(how.group) == 0:
                store.put(number, weights | of_experts, counts)
            collectives.barrier(how.group)
        _hold(linears, experts, store.get(number, device))
        walk.run(number, keep=True)


def _hold(
    linears: Mapping[str, nn.Linear], experts: Mapping[str, ExpertLinears], weights: Mapping[str, AnyPackedWeight]
) -> None:
    """Have the layers compute as those that are packed."""
    for name, weight in weights.items():
        if isinstance(weight, PackedWeight):
            linears[name].weight.data = ops.nf4_dequantize(weight, linears[name].weight.dtype)
        else:
            experts[name].hold_(weight)


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


def _rounded_experts(
    walk: LayerWalk, number: int, how: Calibration
) -> tuple[dict[str, AnyPackedWeight], dict[str, int]]:
    """A layer's experts, for what its rounded linears give them, on the main rank; and what is counted of them."""
    weights: dict[str, AnyPackedWeight] = {}
    counts: Counter[str] = Counter()
    for name, experts in walk.experts(number).items():
        inputs = ExpertInputs(experts)
        with inputs.watched():
            walk.run(number, keep=False)
        rounding = ExpertRounding(experts, name, inputs, how)
        rounding.run()
        weights |= rounding.weights()
        counts.update(rounding.counts)
    return weights, dict(counts)


def _round_group(
    moments: SecondMoments, linears: dict[str, nn.Linear], source: SafetensorsFolder, how: Calibration
) -> Iterator[tuple[str, PackedWeight]]:
    """Weights that see the same inputs. With fewer tokens than columns the moments say too little of how columns go
    together: then their diagonal alone is used, and with no token no column counts for more than another."""
    damped = moments.damped(next(iter(linears)))
    by_search = how.method == "search" or moments.tokens < damped.H_KK.shape[0]
    rounding = InputsRounding.of(damped, how.quant_format, by_search=by_search)
    for name in linears:
        N = source.shape(name)[0]
        start, stop = rows_of_rank(N, collectives.size(how.group), collectives.rank(how.group))
        weight_NK = source.rows(name, start, stop).to(damped.H_KK.device)
        if start < stop:
            formats.check_weight(weight_NK, how.quant_format, name)
        own = rounding.packed(weight_NK, SharedRows(start, N, partial(collectives.all_reduce, group=how.group)))
        yield name, _whole(own, N, how.group)


def _whole(own: PackedWeight, N: int, group: dist.ProcessGroup | None) -> PackedWeight:
    """The weight of which each rank has some rows."""
    codes, absmax = (gathered_rows(part, N, group) for part in (own.codes, own.absmax))
    return PackedWeight(codes, absmax, own.absmax_scales, own.absmax_offset, own.quant_format)
