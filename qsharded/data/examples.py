"""Examples: ids, and which of them are trained on; a dataset is a list of them."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsharded.data.bad_rows import SHOWN


@dataclass(frozen=True, eq=False, init=False)
class Example:
    """One document.

    Attributes:
        ids: int32 [T], given as any sequence.
        trained: bool [T], whether the id is to be trained on; of the first it has no effect, for nothing predicts it.
        group: neighbours of an equal one, such as a chosen and a rejected answer, stay together, in their order, as
            documents of one row; the name is no other group's. None: it stands alone.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    group: Hashable = None

    def __init__(self, ids: ArrayLike, trained: ArrayLike, group: Hashable = None) -> None:
        # Arrays, for lists of Python's numbers would take eight times the memory on every rank.
        object.__setattr__(self, "ids", np.asarray(ids, np.int32))
        object.__setattr__(self, "trained", np.asarray(trained, np.bool_))
        object.__setattr__(self, "group", group)
        assert self.ids.shape == self.trained.shape, "one flag for each id"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """How many ids are trained on: predicted, and counted in the loss."""
        return int(self.trained[1:].sum())


def grouped(examples: Iterable[Example]) -> list[list[Example]]:
    """The groups of ``examples``, in their order; an example without one is a group of its own."""
    groups: list[list[Example]] = []
    for example in examples:
        if groups and example.group is not None and example.group == groups[-1][-1].group:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


@dataclass
class Omitted:
    """What rows have and examples lack, or what else is to be told of rows, of one kind.

    Attributes:
        rows: how many of them.
        example: the first, as ``file:line``, with what is lost there.
    """

    rows: int
    example: str


@dataclass
class Dataset:
    """Examples, and what became of the other rows.

    Attributes:
        examples: none longer than the maximum length, each with something to learn.
        dropped: rows left out for their length.
        truncated: rows cut to the maximum length; they are among ``examples``.
        empty: rows of blank text or with empty answers alone, left out.
        omitted: what the rows have and the examples lack, by its kind.
        bad: rows that cannot be used.
        bad_reasons: of the first of them, each as ``file:line: reason``.
    """

    examples: list[Example]
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    omitted: dict[str, Omitted] = field(default_factory=dict)
    bad: int = 0
    bad_reasons: list[str] = field(default_factory=list)

    def count_omission(self, kind: str, example: str) -> None:
        """Another row lacks something of ``kind``."""
        self.omitted.setdefault(kind, Omitted(0, example)).rows += 1

    def count_bad(self, reason: str) -> None:
        """Another row cannot be used."""
        self.bad += 1
        if len(self.bad_reasons) < SHOWN:
            self.bad_reasons.append(reason)


def split_examples(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, evaluation) parts, the second of about ``fraction`` of the groups of examples, chosen by ``seed``
    alone.

    Both keep the dataset's order and have at least one group; the counts of left-out rows stay with the first.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there are fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out for evaluation must be between 0 and 1, got {fraction}")
    groups = grouped(dataset.examples)
    total = len(groups)
    if total < 2:
        raise ValueError(f"the dataset has {total} example, too few to hold any out for evaluation")
    count = min(max(1, round(total * fraction)), total - 1)
    chosen = set(Random(f"hold out {seed}").sample(range(total), count))
    kept = [example for number, group in enumerate(groups) if number not in chosen for example in group]
    return replace(dataset, examples=kept), Dataset([e for number in sorted(chosen) for e in groups[number]])
