"""Tokens sorted by the expert that computes them.

Axes: M tokens, k experts of each token, E experts, R <= M k pairs of a token and an expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsharded.quant.grouped import Groups


@dataclass(frozen=True)
class Routed:
    """Which tokens each expert gets. What waits for a GPU is found when it is asked for.

    Attributes:
        chosen_Mk: int64, the experts of each token; E for none, as of padding.
        experts: E.
    """

    chosen_Mk: Tensor
    experts: int

    @classmethod
    def of(cls, experts_Mk: Tensor, experts: int, is_routed_M: Tensor | None = None) -> "Routed":
        """Of the ``experts_Mk`` [M, k] that each token chose of so many ``experts``.

        Args:
            is_routed_M: False for tokens that no expert computes, as padding; None: all are computed.
        """
        if is_routed_M is not None and not experts_Mk.is_meta:
            experts_Mk = experts_Mk.where(is_routed_M[:, None], experts)
        return cls(experts_Mk, experts)

    @property
    def per_token(self) -> int:
        """k."""
        return self.chosen_Mk.shape[1]

    @cached_property
    def counts(self) -> "Counts":
        """How many each of the E experts gets. The host waits for a GPU to say them."""
        if self.chosen_Mk.is_meta:
            return Counts(_even(self.chosen_Mk.numel(), self.experts), self.per_token)
        counted = torch.bincount(self.chosen_Mk.flatten(), minlength=self.experts + 1)[: self.experts]
        return Counts(tuple(counted.tolist()), self.per_token)

    @cached_property
    def order_R(self) -> Tensor:
        """int64, places in the flattened [M, k] in the order of their experts; within one, of their tokens."""
        chosen = self.chosen_Mk.flatten()
        if chosen.is_meta:
            return chosen
        return chosen.argsort(stable=True)[: self.counts.pairs]

    @cached_property
    def position_Mk(self) -> Tensor:
        """int32, where each place stands in ``order_R``; -1 if it does not."""
        order_R = self.order_R
        position = order_R.new_full((self.chosen_Mk.numel(),), -1, dtype=torch.int32)
        position[order_R] = torch.arange(len(order_R), dtype=torch.int32, device=order_R.device)
        return position.view(self.chosen_Mk.shape)


@dataclass(frozen=True)
class Counts:
    """How many tokens each of the E experts gets.

    Attributes:
        of_expert: E numbers.
        per_token: k.
    """

    of_expert: tuple[int, ...]
    per_token: int

    @property
    def pairs(self) -> int:
        """R."""
        return sum(self.of_expert)

    def chunks(self, most: int, device: torch.device) -> Iterator["Chunk"]:
        """The experts that got tokens, at most so many at once, with their runs of the R pairs."""
        hit = [e for e, count in enumerate(self.of_expert) if count]
        start = 0
        for first in range(0, len(hit), most):
            chosen = hit[first : first + most]
            counts = tuple(self.of_expert[e] for e in chosen)
            groups = Groups(counts, device)
            yield Chunk(chosen, _index(chosen, device), groups, slice(start, start + sum(counts)))
            start += sum(counts)


@dataclass(frozen=True)
class Chunk:
    """Experts that are computed together.

    Attributes:
        experts: their numbers, ascending.
        index: the same, to index what there is of all E.
        groups: how many pairs each has.
        pairs: where these lie among all R.
    """

    experts: Sequence[int]
    index: slice | Tensor
    groups: Groups
    pairs: slice


def _index(experts: Sequence[int], device: torch.device) -> slice | Tensor:
    """A slice where they follow each other, as all experts do in a large batch: what it takes are views."""
    first, n = experts[0], len(experts)
    if list(experts) == list(range(first, first + n)):
        return slice(first, first + n)
    return torch.tensor(experts, device=device)


def _even(pairs: int, experts: int) -> tuple[int, ...]:
    """For a plan, which knows no values: each expert as many as the others."""
    return tuple(pairs // experts + (e < pairs % experts) for e in range(experts))
