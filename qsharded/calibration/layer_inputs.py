"""Second moments of what the linear layers of one decoder layer see, one for those that share an input."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.calibration.second_moments import SecondMoments


class LayerInputs:
    """Watches linear layers while calibration rows pass.

    Args:
        linears: by name.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._leader: dict[str, str] = {}
        self._moments: dict[str, SecondMoments] = {}
        self._latest: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Add up what they see within the context."""
        handles = [linear.register_forward_pre_hook(partial(self._see, name)) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            self._latest.clear()
            for handle in handles:
                handle.remove()

    def groups(self) -> Iterator[tuple[SecondMoments, list[str]]]:
        """Each group of linears that see the same, with its moments. One that saw nothing has a group of its own."""
        for name, linear in self._linears.items():
            if self._leader.setdefault(name, name) == name:
                moments = self._moments.get(name) or SecondMoments(linear.in_features, linear.weight.device)
                yield moments, [other for other in self._linears if self._leader.get(other, other) == name]

    @torch.no_grad()
    def _see(self, name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        if name not in self._leader:
            sharing = (other for other, seen in self._latest.items() if seen is x)
            self._leader[name] = next(sharing, name)
        if self._leader[name] == name:
            self._latest[name] = x
            moments = self._moments.setdefault(name, SecondMoments(x.shape[-1], x.device))
            moments.add(x)
        elif self._latest[self._leader[name]] is not x:
            raise ValueError(f"{name} shares its input with {self._leader[name]} at times only; use --method nearest")
