"""What the gated MLPs of a layer's experts are made of.

Axes: E experts, D hidden size, J the experts' intermediate size, r rank, R rows sorted by expert.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from qsharded.quant.expert_rows import Glu, add_grouped_
from qsharded.quant.experts import ExpertWeights
from qsharded.quant.grouped import Ends, Groups, grouped_mm


class Update(NamedTuple):
    """Low-rank updates of one or two projections of all experts that share their input: W_e + scaling * B_e A_e.

    Attributes:
        A: [E, r, K].
        B: [E, N, r]; of gate and up, gate's rows before up's.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def narrow(self, x_RK: Tensor, groups: Groups | Ends) -> Tensor:
        """s A x, [R, r]: each group of rows with its expert's."""
        return grouped_mm(x_RK, self.A.transpose(1, 2), groups) * self.scaling

    def add_(self, x_RK: Tensor, groups: Groups | Ends, *outputs: Tensor) -> None:
        """To ``outputs`` [R, N] of the projections that take x, in the order of B's rows."""
        narrow_Rr = self.narrow(x_RK, groups)
        for y_RN, B in zip(outputs, self.B.chunk(len(outputs), dim=1), strict=True):
            add_grouped_(y_RN, narrow_Rr, B.transpose(1, 2), groups)


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
