"""The experts' product for few tokens that need no gradient, as when generating.

Nothing is decoded to memory, and the host waits for nothing: the tokens are sorted on the device, so that a CUDA graph
can hold all of it. The rows of tokens that no expert computes come last; what is in them is not read.

Axes: M tokens, k experts a token, P = M k pairs, E experts, D hidden size, J the experts' intermediate size, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qsharded.quant import expert_rows, grouped
from qsharded.quant.expert_mlp import ExpertMLP, Update
from qsharded.quant.experts import ExpertWeights
from qsharded.quant.pieces import Pieces, rows_of_piece
from qsharded.quant.routing import Routed, whole

_ROOM = 1.5
"""Rows of a piece, times the mean of an expert: most experts are then one piece, and decoded once."""


def serves(x_MD: Tensor, scores_Mk: Tensor, routed: Routed, mlp: ExpertMLP, trained: Sequence[Tensor]) -> bool:
    """Whether :func:`few_tokens` is for these: kernels multiply so few rows of each, and no gradient is asked for.

    Args:
        trained: of the updates.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_MD, scores_Mk, *trained)):
        return False
    if trained and not grouped.is_one_launch(x_MD):  # by which updates are narrowed
        return False
    pairs = routed.chosen_Mk.numel()
    if not expert_rows.sorts(x_MD, pairs, routed.experts):
        return False
    return not any(part.are_decoded(pairs / routed.experts, x_MD) for part in (mlp.gate, mlp.up, mlp.down))


def few_tokens(
    x_MD: Tensor, scores_Mk: Tensor, routed: Routed, mlp: ExpertMLP, updates: tuple[Update | None, Update | None]
) -> Tensor:
    """As :func:`qsharded.quant.expert_product.expert_product`."""
    most = rows_of_piece(_ROOM * routed.chosen_Mk.numel() / routed.experts)
    places = expert_rows.sort(routed.chosen_Mk, routed.experts, most)
    pieces, chunk = Pieces(places.pieces_Q3, most), whole(places.ends_E, len(places.order_P))

    def product(x_PK: Tensor, part: ExpertWeights, bias_EN: Tensor | None) -> Tensor:
        y_PN = part.multiplied(x_PK, pieces)
        return y_PN if bias_EN is None else y_PN.add_(bias_EN[chunk.group_c])

    x_PD = x_MD.index_select(0, places.order_P // routed.per_token)
    gate_PJ, up_PJ = product(x_PD, mlp.gate, mlp.biases[0]), product(x_PD, mlp.up, mlp.biases[1])
    if update := updates[0]:
        update.add_(x_PD, chunk.groups, gate_PJ, up_PJ)
    h_PJ = expert_rows.glu_forward(mlp.glu, gate_PJ, up_PJ)
    y_PD = product(h_PJ, mlp.down, mlp.biases[2])
    if update := updates[1]:
        update.add_(h_PJ, chunk.groups, y_PD)
    return expert_rows.combine(y_PD, places.position_P.view_as(routed.chosen_Mk), scores_Mk)
