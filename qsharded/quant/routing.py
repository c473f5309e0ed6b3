"""Tokens sorted by the expert that computes them.

Axes: M tokens, k experts of each token, E experts, R <= M k pairs of a token and an expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from qsharded.quant.grouped import Ends, Groups, group_of_rows


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
            return Counts(_even(self.chosen_Mk.numel(), self.experts))
        return Counts(tuple(stop - start for start, stop in pairwise([0, *self.ends_E.tolist()])))

    @cached_property
    def ends_E(self) -> Tensor:
        """int32: where each expert's run of pairs ends."""
        chosen_P, _ = self._sorted
        every_E = torch.arange(self.experts, device=chosen_P.device)
        return torch.searchsorted(chosen_P, every_E, right=True, out_int32=True)

    @cached_property
    def order_P(self) -> Tensor:
        """int64, places in the flattened [M, k] in the order of their experts; within one, of their tokens. Those of
        no expert come last."""
        return self._sorted[1]

    @cached_property
    def position_Mk(self) -> Tensor:
        """int32, where each place stands in ``order_P``; -1 for those of no expert."""
        chosen_P, order_P = self._sorted
        every_P = torch.arange(len(order_P), dtype=torch.int32, device=order_P.device)
        position_P = torch.empty_like(every_P)
        position_P[order_P] = every_P.where(chosen_P < self.experts, -1)
        return position_P.view(self.chosen_Mk.shape)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        values, order = self.chosen_Mk.flatten().sort(stable=True)
        return values, order


@dataclass(frozen=True)
class Counts:
    """How many tokens each of the E experts gets.

    Attributes:
        of_expert: E numbers.
    """

    of_expert: tuple[int, ...]

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
        groups: which pairs each has.
        pairs: where these lie among all R.
    """

    experts: Sequence[int]
    index: slice | Tensor
    groups: Groups | Ends
    pairs: slice

    @cached_property
    def group_c(self) -> Tensor:
        """int64, the number of each pair's group; of pairs of no expert, any."""
        return group_of_rows(self.groups, self.pairs.stop - self.pairs.start)


def whole(ends_E: Tensor, pairs: int) -> Chunk:
    """All experts at once, for which the host need not know the counts; the last pairs may be of none."""
    return Chunk(range(len(ends_E)), slice(0, len(ends_E)), Ends(ends_E), slice(0, pairs))


def _index(experts: Sequence[int], device: torch.device) -> slice | Tensor:
    """A slice where they follow each other, as all experts do in a large batch: what it takes are views."""
    first, n = experts[0], len(experts)
    if list(experts) == list(range(first, first + n)):
        return slice(first, first + n)
    return torch.tensor(experts, device=device)


def _even(pairs: int, experts: int) -> tuple[int, ...]:
    """For a plan, which knows no values: each expert as many as the others."""
    return tuple(pairs // experts + (e < pairs % experts) for e in range(experts))
