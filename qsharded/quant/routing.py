"""Tokens sorted by the expert that computes them.

Axes: M tokens, k experts of each token, E experts, R <= M k pairs of a token and an expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.quant.grouped import Groups


@dataclass(frozen=True)
class Routed:
    """Which tokens each expert gets.

    Attributes:
        order_R: int64, places in the flattened [M, k] in the order of their experts; within one, of their tokens.
        counts: how many each of the E experts gets.
        per_token: k.
    """

    order_R: Tensor
    counts: tuple[int, ...]
    per_token: int

    @classmethod
    def of(cls, experts_Mk: Tensor, experts: int, is_routed_M: Tensor | None = None) -> "Routed":
        """Of the ``experts_Mk`` [M, k] that each token chose of so many ``experts``.

        The host learns the counts, and waits for a GPU to say them: they decide what is dequantized.

        Args:
            is_routed_M: False for tokens that no expert computes, as padding; None: all are computed.
        """
        M, k = experts_Mk.shape
        if experts_Mk.is_meta:
            return cls(experts_Mk.flatten(), _even(M * k, experts), k)
        chosen = experts_Mk.flatten()
        if is_routed_M is not None:
            chosen = chosen.where(is_routed_M.repeat_interleave(k), experts)
        counts = torch.bincount(chosen, minlength=experts + 1)[:experts].tolist()
        return cls(chosen.argsort(stable=True)[: sum(counts)], tuple(counts), k)

    @property
    def pairs(self) -> int:
        """R."""
        return sum(self.counts)

    def chunks(self, most: int) -> Iterator["Chunk"]:
        """The experts that got tokens, at most so many at once, with their runs of the R pairs."""
        hit = [e for e, count in enumerate(self.counts) if count]
        start = 0
        for first in range(0, len(hit), most):
            chosen = hit[first : first + most]
            counts = tuple(self.counts[e] for e in chosen)
            groups = Groups(counts, self.order_R.device)
            yield Chunk(chosen, _index(chosen, self.order_R.device), groups, slice(start, start + sum(counts)))
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
