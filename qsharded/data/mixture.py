"""Several datasets as one: how many rows of each an epoch takes, and which.

Without weights an epoch takes every row once. With weights it takes as many rows as it can in the given shares without
a row twice, as ``datasets.interleave_datasets`` does by default: the dataset that is the smallest for its weight is
taken whole and ends the epoch. Of a larger dataset the next epochs take other rows, until too few are left for one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Protocol

from qsharded.data.examples import Dataset, Example
from qsharded.data.facts import joined
from qsharded.data.held_out import split_examples


class Windows(Protocol):
    """Rows that come in windows; :class:`qsharded.data.streams.Streams` is one."""

    def window(self, number: int) -> "Mixture":
        """The rows of a window."""

    def notes(self, one_example_per_answer: bool) -> list[str]:
        """What is told of all rows that were read so far."""


@dataclass(frozen=True)
class Mixture:
    """Datasets that are trained on together.

    Attributes:
        parts: the datasets, each with a row at least, by the name that the user has for it.
        weights: one above 0 for each part, in their order; only their ratios count. None: every row once an epoch.
        streams: whose first window this is; None: it is all that there is.
    """

    parts: Mapping[str, Dataset]
    weights: Sequence[float] | None = None
    streams: "Windows | None" = None

    @cached_property
    def examples(self) -> Sequence[Example]:
        """All rows, one dataset after the other."""
        return joined([part.examples for part in self.parts.values()])

    def rows_an_epoch(self) -> list[int]:
        """How many rows of each part an epoch takes. With weights, shares are met to half a row, but for a part whose
        share is less than that, of which one row is taken."""
        sizes = [len(part.examples) for part in self.parts.values()]
        if self.weights is None:
            return sizes
        weights = [Fraction(weight) for weight in self.weights]  # exact, whatever their magnitudes
        rows_by_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        return [max(1, round(weight * rows_by_weight)) for weight in weights]

    def draw(self, seed: int) -> Callable[[int], list[int]] | None:
        """From an epoch's number to the numbers of the ``examples`` that it takes, as many in each epoch; None: all.

        They depend on seed and epoch alone.
        """
        return None if self.weights is None else partial(self._drawn, seed)

    def _drawn(self, seed: int, epoch: int) -> list[int]:
        sizes = [len(part.examples) for part in self.parts.values()]
        starts = accumulate(sizes, initial=0)
        shares = enumerate(zip(starts, sizes, self.rows_an_epoch(), strict=False))
        return [
            start + row
            for number, (start, size, count) in shares
            for row in _rows_of_epoch(f"mixture {seed} {number}", epoch, size, count)
        ]

    def split(self, fraction: float, seed: int) -> tuple["Mixture", Dataset]:
        """(training, evaluation) parts: of each dataset ``fraction`` is held out, as ``split_examples`` does it.

        Raises:
            ValueError: as there; the dataset is named.
        """
        halves = {name: _split(name, part, fraction, seed) for name, part in self.parts.items()}
        kept = {name: train for name, (train, _) in halves.items()}
        return Mixture(kept, self.weights), Dataset(joined([evaluation.examples for _, evaluation in halves.values()]))


def _rows_of_epoch(purpose: str, epoch: int, size: int, count: int) -> list[int]:
    """``count`` of ``size`` rows. Epoch after epoch takes the next of one shuffled order, and a new order follows when
    fewer than ``count`` are left of it: no row comes twice in an epoch, and all come about equally often."""
    a_pass, place = divmod(epoch, size // count)
    order = Random(f"{purpose} {a_pass}").sample(range(size), size)
    return order[place * count : (place + 1) * count]


def _split(name: str, part: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    try:
        return split_examples(part, fraction, seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def refuse_overlaps(sources: Sequence[tuple[str, Sequence[Path]]]) -> None:
    """Raise ValueError where two of the ``sources``, each with its files, share one: its rows would count twice, and
    what is held out of one be trained on in the other."""
    owners: dict[Path, str] = {}
    for source, paths in sources:
        files = {path.resolve() for path in paths}
        for path in sorted(files & owners.keys()):
            raise ValueError(
                f"--dataset {owners[path]} and --dataset {source} both hold {path}: name it once; --dataset-weights "
                "make a dataset count for more"
            )
        owners |= dict.fromkeys(files, source)
