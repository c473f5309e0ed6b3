"""What the gated MLPs of a layer's experts are made of.

Axes: E experts, D hidden size, J the experts' intermediate size, r rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from qsharded.quant.expert_rows import Glu
from qsharded.quant.experts import ExpertWeights


class Update(NamedTuple):
    """Low-rank updates of one or two projections of all experts that share their input: W_e + scaling * B_e A_e.

    Attributes:
        A: [E, r, K].
        B: [E, N, r]; of gate and up, gate's rows before up's.
    """

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class ExpertMLP:
    """What the experts of a layer compute with: frozen matrices and biases [E, N].

    Attributes:
        gate, up: [J, D] of each expert.
        down: [D, J] of each.
    """

    gate: ExpertWeights
    up: ExpertWeights
    down: ExpertWeights
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    glu: Glu
