"""Embedding and logits where each rank holds some of the vocabulary's rows; the loss is in ``vocab_parallel_loss``.

Each rank has tokens of its own, in a number of its own. Hidden states travel, weights do not: a token's hidden state is
far smaller than the rows of a 128k vocabulary. Every rank calls these functions together with the others. No weight
gets a gradient.

Axes: W ranks, T this rank's tokens, M the most that a rank has, C tokens of one chunk, D hidden size, V vocabulary,
v this rank's rows of it, R = ceil(V / W) rows of a full share.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.utils import collectives
from qsharded.utils.sharding import RowRange, rows_per_rank

# 2^25 bf16 values are 64 MiB: the rows looked up for all ranks at a time.
_LOOKED_UP_AT_A_TIME = 1 << 25


def lookup(ids_T: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    """The embedding's rows [T, D] of ``ids_T``, on its device. The weight may lie in host memory.

    Args:
        ids_T: int64, each in [0, V).
        weight_vD: the rows of the embedding that this rank holds, as ``rows`` says.

    Raises:
        IndexError: an id of any rank's is outside the vocabulary (on a GPU, a device-side assertion).
    """
    ids_WM = collectives.all_gather(padded(ids_T, most(ids_T, rows), 0), rows.group)
    step = max(1, _LOOKED_UP_AT_A_TIME // (ids_WM.shape[0] * weight_vD.shape[1]))
    parts = [_look_up_chunk(ids_WC, weight_vD, rows) for ids_WC in ids_WM.split(step, dim=1)]
    return torch.cat(parts)[: ids_T.shape[0]]


def _look_up_chunk(ids_WC: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    looked_up_WCD = _own_rows_of(ids_WC.to(weight_vD.device), weight_vD, rows).to(ids_WC.device)
    # Of the ranks' rows all but one are zeros, so that their sum as integers is exact, in any dtype.
    whole_CI = collectives.reduce_scatter(looked_up_WCD.view(torch.int32), rows.group)
    return whole_CI.view(weight_vD.dtype)


def _own_rows_of(ids_WC: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    if rows.count == 0:
        return weight_vD.new_zeros(*ids_WC.shape, weight_vD.shape[1])
    # Ids that no rank has count as the outermost ranks' own: there the look-up refuses them.
    elsewhere_WC = torch.zeros_like(ids_WC, dtype=torch.bool)
    if rows.start > 0:
        elsewhere_WC |= ids_WC < rows.start
    if rows.stop < rows.total:
        elsewhere_WC |= ids_WC >= rows.stop
    found_WCD = F.embedding((ids_WC - rows.start).masked_fill(elsewhere_WC, 0), weight_vD)
    return found_WCD.masked_fill_(elsewhere_WC[..., None], 0)


def logits(hidden_TD: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
    """``hidden @ weight.T`` over the whole vocabulary, [T, V]. Gradients: hidden."""
    result: Tensor = _Logits.apply(hidden_TD, weight_vD, rows)
    return result


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, rows: RowRange) -> Tensor:
        ctx.save_for_backward(weight_vD)
        ctx.rows, ctx.tokens = rows, (hidden_TD.shape[0], most(hidden_TD, rows))
        T, M = ctx.tokens
        hidden_WMD = collectives.all_gather(padded(hidden_TD, M, 0), rows.group)
        share = _share(rows)
        parts_WMR = F.pad(hidden_WMD @ weight_vD.T, (0, share - rows.count))
        received_WMR = collectives.all_to_all(parts_WMR, rows.group)
        return received_WMR.transpose(0, 1).flatten(1)[:T, : rows.total].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        (weight_vD,), rows, (T, M) = ctx.saved_tensors, ctx.rows, ctx.tokens
        share, ranks = _share(rows), collectives.size(rows.group)
        grad_MV = padded(F.pad(grad_TV, (0, share * ranks - rows.total)), M, 0)
        grad_WMR = collectives.all_to_all(grad_MV.unflatten(1, (ranks, share)).transpose(0, 1), rows.group)
        grad_hidden_MD = summed(grad_WMR[..., : rows.count] @ weight_vD, rows)
        return grad_hidden_MD[:T], None, None


def most(own_T: Tensor, rows: RowRange) -> int:
    return collectives.largest(own_T.shape[0], own_T.device, rows.group)


def _share(rows: RowRange) -> int:
    return rows_per_rank(rows.total, collectives.size(rows.group))


def padded(own_T: Tensor, length: int, value: int) -> Tensor:
    """``own_T`` [T, ...] with rows of ``value`` behind it up to ``length``."""
    missing = length - own_T.shape[0]
    return torch.cat((own_T, own_T.new_full((missing, *own_T.shape[1:]), value))) if missing else own_T


def summed(parts_WCD: Tensor, rows: RowRange) -> Tensor:
    """This rank's [C, D] of the sum of the ranks' parts, added in fp32."""
    return collectives.reduce_scatter(parts_WCD.to(precise(parts_WCD)), rows.group).to(parts_WCD.dtype)


def precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
