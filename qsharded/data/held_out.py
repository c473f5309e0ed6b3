"""Which of a dataset's examples are held out of training, to evaluate on."""

from dataclasses import replace
from random import Random

import numpy as np

from qsharded.data.examples import Dataset
from qsharded.data.facts import group_starts, taken


def split_examples(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, evaluation) parts, the second of about ``fraction`` of the groups of examples, chosen by ``seed``
    alone.

    Both keep the dataset's order and have at least one group; the counts of left-out rows stay with the first.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there are fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out for evaluation must be between 0 and 1, got {fraction}")
    starts = group_starts(dataset.examples)
    total = len(starts) - 1
    if total < 2:
        raise ValueError(f"the dataset has {total} example, too few to hold any out for evaluation")
    count = min(max(1, round(total * fraction)), total - 1)
    is_chosen = np.zeros(total, np.bool_)
    is_chosen[Random(f"hold out {seed}").sample(range(total), count)] = True
    held_out = np.repeat(is_chosen, np.diff(starts))
    kept, evaluated = (taken(dataset.examples, np.flatnonzero(which)) for which in (~held_out, held_out))
    return replace(dataset, examples=kept), Dataset(evaluated)
