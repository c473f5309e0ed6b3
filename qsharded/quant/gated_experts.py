"""The gated MLPs of a layer's experts, each projection of all of them a module: what our decoder's mixtures and those
that take the place of transformers' have in common.

Axes: M tokens, k experts of a token, E experts, D hidden size, J intermediate size of an expert, r rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.quant.expert_mlp import ExpertMLP, Update
from qsharded.quant.expert_product import expert_product
from qsharded.quant.expert_rows import Glu
from qsharded.quant.experts import DOWN, GATE_UP, ExpertLinears
from qsharded.quant.routing import Routed


class GatedExperts(nn.Module):
    """Gate and up [E, J, D], down [E, D, J].

    Attributes:
        gate_proj, up_proj, down_proj: the projections, in 16 bits or packed.
        glu: from gate and up to what the down projection takes.
        interleaved: whether gate and up are alternate rows of the one parameter that transformers holds them in, as an
            adapter of it has them too; or gate's are before up's.
    """

    def __init__(
        self, gate: ExpertLinears, up: ExpertLinears, down: ExpertLinears, *, glu: Glu, interleaved: bool
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.glu, self.interleaved = glu, interleaved

    def parameter_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of each parameter that transformers has in this one's place: (E, N, K) of its matrices."""
        E, J, D = self.gate_proj.experts, self.gate_proj.out_features, self.gate_proj.in_features
        return {GATE_UP: (E, 2 * J, D), DOWN: (E, D, J)}

    def routing(self, x: Tensor, *routing: Any) -> tuple[Tensor, Tensor, Routed]:
        """Tokens [M, D], the scores [M, k] of their experts, and these, of what it is called with: just that here."""
        scores_Mk, routed = routing
        return x, scores_Mk, routed

    def forward(self, x: Tensor, *routing: Any, updates: Mapping[str, Update] | None = None) -> Tensor:
        """Each token's weighted sum, in x's shape.

        Args:
            routing: how tokens are routed, as :meth:`routing` takes it.
            updates: of parameters, by their names in ``parameter_shapes``.
        """
        x_MD, scores_Mk, routed = self.routing(x, *routing)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        biases = _bias(gate, x_MD.dtype), _bias(up, x_MD.dtype), _bias(down, x_MD.dtype)
        mlp = ExpertMLP(gate.packed(), up.packed(), down.packed(), biases, self.glu)
        updates = updates or {}
        update_in = updates.get(GATE_UP)
        if update_in is not None and self.interleaved:
            update_in = update_in._replace(B=gate_before_up(update_in.B))
        return expert_product(x_MD, scores_Mk, routed, mlp, update_in, updates.get(DOWN)).view_as(x)


def _bias(part: ExpertLinears, dtype: torch.dtype) -> Tensor | None:
    return None if part.bias is None else part.bias.to(dtype)


def gate_before_up(B_ENr: Tensor) -> Tensor:
    """Of rows that alternate between gate and up, gate's and then up's."""
    return torch.cat((B_ENr[:, ::2], B_ENr[:, 1::2]), dim=1)
