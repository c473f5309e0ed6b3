"""The tokens that a layer's experts get while calibration rows pass, kept in host memory.

They are kept once, in the order in which they came. An expert's own are brought back when its turn comes, so that its
second moments alone are in memory, not those of all E.

Axes: M tokens of a pass of some rows, k experts of each, n tokens of one expert, D hidden size, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsharded.calibration.layer_walk import on_host
from qsharded.quant.gated_experts import GatedExperts


class _Pass(NamedTuple):
    """One forward's tokens, and the experts that each chose."""

    x_MD: Tensor
    chosen_Mk: Tensor

    def of_expert(self, e: int) -> Tensor:
        return self.x_MD[(self.chosen_Mk == e).any(1)]


class ExpertInputs:
    """Watches a layer's experts while calibration rows pass."""

    def __init__(self, experts: GatedExperts) -> None:
        self._experts = experts
        self._passes: list[_Pass] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep what they get within the context."""
        handle = self._experts.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def of_all(self, device: torch.device) -> Iterator[Tensor]:
        """Every token [M, D] that a router gave to experts, once, some at a time."""
        return (one.x_MD.to(device) for one in self._passes)

    def of_expert(self, e: int, device: torch.device) -> Tensor:
        """Those of expert ``e``, [n, D]."""
        return torch.cat([one.of_expert(e) for one in self._passes]).to(device)

    @torch.no_grad()
    def _see(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x_MD, _scores, routed = self._experts.routing(*arguments)
        self._passes.append(_Pass(on_host(x_MD), routed.chosen_Mk.cpu()))
