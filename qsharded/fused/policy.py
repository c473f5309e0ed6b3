"""What of a fused layer waits for its backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EVERYTHING = frozenset({"qkv", "attention", "h", "gate_up"})
"""What a layer can keep for its backward beside its input, in the order in which it is computed. "gate_up" stands for
all that a mixture of experts keeps."""


class LayerInput:
    """How a layer's input waits for the backward: here as it is."""

    def __init__(self, x_BSD: Tensor) -> None:
        self._x_BSD = x_BSD

    def take(self) -> Tensor:
        """The input again."""
        return self._x_BSD


@dataclass(frozen=True)
class Policy:
    """What waits for a layer's backward.

    Attributes:
        kept: of ``EVERYTHING``; the rest is computed again.
        keep_input: called with the layer's input; its result's ``take()`` gives the input back, once.
        weights_present: for weights that are elsewhere between calls: a context on a device in which the layer's
            modules hold them. They are then asked for again in the backward, and not kept.
    """

    kept: frozenset[str] = EVERYTHING
    keep_input: Callable[[Tensor], Any] = LayerInput
    weights_present: Callable[[torch.device], AbstractContextManager[None]] | None = None

    def present(self, device: torch.device) -> AbstractContextManager[None]:
        """A context on ``device`` in which the layer's modules hold their weights."""
        return nullcontext() if self.weights_present is None else self.weights_present(device)


KEEP_EVERYTHING = Policy()
"""Nothing is computed again."""
