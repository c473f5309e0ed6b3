"""Rounding whose errors are made up for by the weights that are still to be rounded.

Columns are rounded one after the other, and what a column's rounding does to the layer's outputs is taken off the later
columns, as far as their inputs go with its own. So in GPTQ (Frantar et al., arXiv:2210.17323); the scales of a block
are chosen when its turn comes, from weights that are compensated already.

Axes: N = rows, K = in_features, B = weights in a block, G = blocks in a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.calibration.column_loop import round_columns
from qsharded.calibration.scale_frame import ScaleFrame
from qsharded.calibration.scale_search import nearest_codes, search_scales
from qsharded.calibration.second_moments import DampedMoments
from qsharded.quant.formats import QuantFormat, two_to_a_byte
from qsharded.quant.pack_weight import SharedRows
from qsharded.quant.packed_weight import PackedWeight


@dataclass(frozen=True)
class ColumnOrder:
    """In which order columns are rounded: those whose inputs are large first, blocks kept whole.

    Attributes:
        blocks: numbers of the blocks.
        order_K: int64, those of the columns.
        U_KK: fp32, upper, U^T U the inverse of the second moments in that order.
    """

    blocks: list[int]
    order_K: Tensor
    U_KK: Tensor

    @classmethod
    def of(cls, moments: DampedMoments, block_size: int) -> "ColumnOrder":
        """By the diagonal: blocks by their mean, columns within a block by their own."""
        importance_GB = moments.importance_K.unflatten(0, (-1, block_size))
        blocks_G = importance_GB.mean(1).argsort(descending=True, stable=True)
        inside_GB = importance_GB.argsort(descending=True, stable=True)
        order_K = (blocks_G[:, None] * block_size + inside_GB[blocks_G]).flatten()
        return cls(blocks_G.tolist(), order_K, moments.inverse_factor(order_K))


@dataclass(frozen=True)
class InputsRounding:
    """How weights that see the same inputs are rounded.

    Attributes:
        importance_K: of each input column.
        order: None chooses scales alone.
    """

    importance_K: Tensor
    order: ColumnOrder | None
    quant_format: QuantFormat

    @classmethod
    def of(cls, moments: DampedMoments, quant_format: QuantFormat, *, by_search: bool) -> "InputsRounding":
        """For inputs with these second moments."""
        order = None if by_search else ColumnOrder.of(moments, quant_format.block_size)
        return cls(moments.importance_K, order, quant_format)

    def packed(self, weight_NK: Tensor, rows: SharedRows) -> PackedWeight:
        """A finite weight, or this rank's ``rows`` of it."""
        if self.order is None:
            return searched(weight_NK, self.importance_K, self.quant_format, rows)
        return compensated(weight_NK, self.importance_K, self.order, self.quant_format, rows)


def searched(weight_NK: Tensor, importance_K: Tensor, quant_format: QuantFormat, rows: SharedRows) -> PackedWeight:
    """The weight, or this rank's ``rows`` of it, rounded to nearest under searched scales.

    Args:
        weight_NK: finite.
        importance_K: fp32 [K], of each input column.
    """
    blocks_NGB = weight_NK.float().unflatten(1, (-1, quant_format.block_size))
    N, G, B = blocks_NGB.shape
    importance_MB = importance_K.view(1, G, B).expand(N, G, B).reshape(-1, B)
    frame = _frame(blocks_NGB, importance_MB, quant_format, rows)
    readable = frame.readable(frame.own_NG.flatten())
    scales_NG = search_scales(blocks_NGB.flatten(0, 1), importance_MB, quant_format, readable).view(N, G)
    codes_NGB = nearest_codes(blocks_NGB, scales_NG[..., None], quant_format)
    absmax_NG = frame.encode(scales_NG, frame.own_NG)
    return PackedWeight(two_to_a_byte(codes_NGB.flatten(1)), absmax_NG, frame.scales, frame.offset, quant_format)


def _frame(blocks_NGB: Tensor, importance_MB: Tensor, quant_format: QuantFormat, rows: SharedRows) -> ScaleFrame:
    wanted_M = search_scales(blocks_NGB.flatten(0, 1), importance_MB, quant_format)
    return ScaleFrame.of(wanted_M.view(blocks_NGB.shape[:2]), rows)


def compensated(
    weight_NK: Tensor, importance_K: Tensor, order: ColumnOrder, quant_format: QuantFormat, rows: SharedRows
) -> PackedWeight:
    """The weight, or this rank's ``rows`` of it, with compensated errors.

    Args:
        weight_NK: finite.
        importance_K: fp32 [K], of each input column.
        order: of the columns.
    """
    B = quant_format.block_size
    blocks_NGB = weight_NK.float().unflatten(1, (-1, B))
    N, G, _ = blocks_NGB.shape
    frame = _frame(blocks_NGB, importance_K.view(1, G, B).expand(N, G, B).reshape(-1, B), quant_format, rows)
    left_NK = weight_NK.float()[:, order.order_K]
    importance_GB = importance_K[order.order_K].view(G, B)
    codes_NK = torch.empty(N, G * B, dtype=torch.uint8, device=weight_NK.device)
    absmax_NG = torch.empty(N, G, dtype=torch.uint8, device=weight_NK.device)
    for place, block in enumerate(order.blocks):
        now, later = slice(place * B, (place + 1) * B), slice((place + 1) * B, None)
        own_N = frame.own_NG[:, block]
        block_NB = left_NK[:, now].contiguous()
        absmax_NG[:, block], scales_N = _block_scales(block_NB, importance_GB[place], quant_format, frame, own_N)
        codes_NB, error_NB = round_columns(block_NB, scales_N, order.U_KK[now, now], quant_format)
        codes_NK[:, order.order_K[now]] = codes_NB
        left_NK[:, later].addmm_(error_NB, order.U_KK[now, later], alpha=-1)
    return PackedWeight(two_to_a_byte(codes_NK), absmax_NG, frame.scales, frame.offset, quant_format)


def _block_scales(
    block_NB: Tensor, importance_B: Tensor, quant_format: QuantFormat, frame: ScaleFrame, own_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N], scales fp32 [N] as they are read) of one block of every row."""
    scales_N = search_scales(block_NB, importance_B[None], quant_format, frame.readable(own_N))
    codes_N = frame.encode(scales_N, own_N)
    return codes_N, frame.decode(codes_N, own_N)
