"""The ways to checkpoint activations. Apart from ``recompute``, for who names them and has no need of PyTorch."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["none", "selective", "full", "offloaded"]
"""none keeps all that a backward reads; selective keeps what attention takes and puts out, the dearest for its size;
full keeps a layer's input alone; offloaded keeps that in host memory. Each takes less memory than the one before."""

ModeOrAuto = Literal["auto", Mode]


@dataclass(frozen=True)
class Checkpointing:
    """How the layers of a model are checkpointed.

    Attributes:
        mode: of the first ``layers``; the others keep all. The last layers keep, since their backward comes first: what
            they have kept is gone when the first are computed again.
        layers: None for all of them.
    """

    mode: Mode = "none"
    layers: int | None = None

    def modes(self, layers: int) -> list[Mode]:
        """Of each of so many layers."""
        checkpointed = self.checkpointed(layers)
        return [self.mode] * checkpointed + ["none"] * (layers - checkpointed)

    def checkpointed(self, layers: int) -> int:
        """How many of so many layers are not "none"."""
        if self.mode == "none":
            return 0
        return layers if self.layers is None else min(self.layers, layers)


KEEP_ALL = Checkpointing()
"""Nothing is computed again."""
