"""From a weight in 16 or 32 bits to a packed one: quantized, then double-quantized, whole or by the rows of ranks.

Axes: N = this rank's rows, K = in_features, G = blocks in a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.quant import backends, formats, ops
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.packed_weight import PackedWeight, QuantizedAbsmax


@dataclass(frozen=True)
class SharedRows:
    """The rows of one rank, of a weight whose scales ranks agree on.

    Attributes:
        start, total: the first of them, and how many the whole weight has.
        all_reduce: a tensor in place, over the ranks that share the weight.
    """

    start: int
    total: int
    all_reduce: Callable[[Tensor, dist.ReduceOp.RedOpType], object]


def pack_weight(
    weight_NK: Tensor,
    quant_format: QuantFormat = NF4_64,
    *,
    double_quant: bool = True,
    rows: SharedRows | None = None,
) -> PackedWeight:
    """The weight, or ``rows`` of it, packed on its device. All of its ranks come here, those without rows too.

    Raises:
        ValueError: as ``ops.nf4_quantize``. NaN and infinity are the caller's to look for.
    """
    codes, absmax = ops.nf4_quantize(weight_NK, quant_format)
    if not (double_quant and quant_format.scale_encoding.nests):
        return PackedWeight(codes, absmax, None, None, quant_format)
    return PackedWeight(codes, *double_quantize(absmax, rows), quant_format)


def double_quantize(absmax_NG: Tensor, rows: SharedRows | None = None) -> QuantizedAbsmax:
    """A whole weight's absmax, or ``rows`` of it, in 8 bits: on any number of ranks to the same bytes."""
    if rows is None:
        return QuantizedAbsmax(*backends.double_quantize(absmax_NG))
    scales, offset = second_level(absmax_NG, rows)
    codes = backends.encode_absmax(absmax_NG, scales, offset, first_row=rows.start)
    return QuantizedAbsmax(codes, scales, offset)


def second_level(absmax_NG: Tensor, rows: SharedRows) -> tuple[Tensor, Tensor]:
    """Its scales fp32 [ceil(total*G/256)] and its offset fp32 [], of the whole weight, alike on all of its ranks."""
    offset = _agreed_offset(absmax_NG, rows)
    scales = backends.absmax_scales(absmax_NG, offset, first_row=rows.start, rows=rows.total)
    rows.all_reduce(scales, dist.ReduceOp.MAX)
    return scales, offset


def _agreed_offset(absmax_NG: Tensor, rows: SharedRows) -> Tensor:
    """The offset of the whole weight. Each row sum comes from one rank alone, the others add 0: exact."""
    sums_N = torch.zeros(rows.total, dtype=torch.float64, device=absmax_NG.device)
    sums_N[rows.start : rows.start + absmax_NG.shape[0]] = backends.absmax_row_sums(absmax_NG)
    rows.all_reduce(sums_N, dist.ReduceOp.SUM)
    return backends.absmax_offset(sums_N, absmax_NG.shape[1])


def double_quantize_experts(absmax_RG: Tensor, experts: int, rows: SharedRows) -> QuantizedAbsmax:
    """Absmax of one projection of all of a layer's experts in 8 bits, each expert's by itself, as
    :func:`double_quantize` makes it of that one alone; two collectives serve all of them.

    Args:
        absmax_RG: fp32, of this rank's ``rows`` of the E N rows of all experts; a run may begin and end inside one.

    Returns codes uint8 [R, G], scales fp32 [E, S] and offsets fp32 [E].
    """
    N, G = rows.total // experts, absmax_RG.shape[1]
    offset_E = _expert_offsets(absmax_RG, experts, rows)
    scales_ES = absmax_RG.new_zeros(experts, formats.second_level_blocks(N, G))
    codes_RG = torch.empty_like(absmax_RG, dtype=torch.uint8)
    own = list(_own_experts(rows.start, rows.start + absmax_RG.shape[0], N))
    for e, first, part in own:
        scales_ES[e] = backends.absmax_scales(absmax_RG[part], offset_E[e], first_row=first, rows=N)
    rows.all_reduce(scales_ES, dist.ReduceOp.MAX)
    for e, first, part in own:
        codes_RG[part] = backends.encode_absmax(absmax_RG[part], scales_ES[e], offset_E[e], first_row=first)
    return QuantizedAbsmax(codes_RG, scales_ES, offset_E)


def _expert_offsets(absmax_RG: Tensor, experts: int, rows: SharedRows) -> Tensor:
    """fp32 [E]: of each expert what ``formats.absmax_offset`` gives, added in the same order."""
    sums = torch.zeros(rows.total, dtype=torch.float64, device=absmax_RG.device)
    sums[rows.start : rows.start + absmax_RG.shape[0]] = backends.absmax_row_sums(absmax_RG)
    rows.all_reduce(sums, dist.ReduceOp.SUM)
    offsets = [backends.absmax_offset(sums_N, absmax_RG.shape[1]) for sums_N in sums.cpu().view(experts, -1)]
    return torch.stack(offsets).to(absmax_RG.device)


def _own_experts(start: int, stop: int, N: int) -> Iterator[tuple[int, int, slice]]:
    """Of the rows [start, stop): (expert, the first of its own rows that is here, its rows among those here)."""
    for e in range(start // N, -(-stop // N)):
        first, last = max(start, e * N), min(stop, (e + 1) * N)
        if first < last:
            yield e, first - e * N, slice(first - start, last - start)


def rounded(weight_NK: Tensor, quant_format: QuantFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight in ``dtype`` as a model in 4 bits computes with it: packed, doubly, and dequantized."""
    return ops.nf4_dequantize(pack_weight(weight_NK, quant_format), dtype)
