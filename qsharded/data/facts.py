"""What is known of each example without its ids: the columns that order, packing and checks of a run need.

A million examples in Python's objects would take a gigabyte on every rank. Those of the cache stay on the disk
(:mod:`qsharded.data.stored`), with these columns beside them; lists of examples, as tests and library users have them,
give the same columns.

Axes: N examples.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from qsharded.data.examples import Example, grouped

Facts = NDArray[np.void]

FACTS = np.dtype(
    [
        ("length", "<i4"),  # tokens
        ("trained", "<i4"),  # targets in the loss
        ("largest", "<i4"),  # id
        ("ids", "<u8"),  # hash of the ids
        ("mask", "<u8"),  # hash of which of them are trained
    ]
)


def facts_of(examples: Sequence[Example]) -> Facts:
    """[N] of :data:`FACTS`."""
    if isinstance(examples, ExamplesView):
        return examples.facts
    return np.array([_facts(example) for example in examples], FACTS)


def lengths_of(examples: Sequence[Example], numbers: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The numbers of tokens of the examples of these ``numbers``; None: of all."""
    if isinstance(examples, ExamplesView):
        return _column(examples, "length", numbers)
    return np.array([len(example) for example in _chosen(examples, numbers)], np.int64)


def trained_of(examples: Sequence[Example], numbers: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """How many targets in the loss each of these examples has; None: of all."""
    if isinstance(examples, ExamplesView):
        return _column(examples, "trained", numbers)
    return np.array([example.trained_tokens for example in _chosen(examples, numbers)], np.int64)


def groups_among(examples: Sequence[Example], numbers: NDArray[np.int64]) -> int:
    """How many groups these neighbours in a row are; an example without one is a group of its own."""
    return len(numbers) if isinstance(examples, ExamplesView) else len(grouped(_chosen(examples, numbers)))


def group_starts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """[G + 1] where each group of examples begins, and N. An example without a group is one of its own."""
    count = len(examples)
    if isinstance(examples, ExamplesView):  # they have none
        return np.arange(count + 1)
    groups = [example.group for example in examples]
    begins = [at == 0 or groups[at] is None or groups[at] != groups[at - 1] for at in range(count)]
    return np.append(np.flatnonzero(begins), count)


def _column(examples: "ExamplesView", name: str, numbers: NDArray[np.int64] | None) -> NDArray[np.int64]:
    column = examples.facts[name]
    return (column if numbers is None else column[numbers]).astype(np.int64)


def _chosen(examples: Sequence[Example], numbers: NDArray[np.int64] | None) -> Sequence[Example]:
    return examples if numbers is None else [examples[number] for number in numbers.tolist()]


def _facts(example: Example) -> tuple[int, int, int, int, int]:
    ids, mask = example.ids.astype("<i4"), np.packbits(example.trained)
    return len(example), example.trained_tokens, int(ids.max(initial=0)), _hash(ids), _hash(mask)


def _hash(values: NDArray[np.generic]) -> int:
    return int.from_bytes(hashlib.blake2b(values.tobytes(), digest_size=8).digest(), "little")


class ExamplesView(Sequence[Example]):
    """Examples that are made when they are asked for. They have no groups.

    Attributes:
        facts: [N] of :data:`FACTS`.
    """

    facts: Facts

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Example]: ...

    def __getitem__(self, at: int | slice) -> Example | Sequence[Example]:
        numbers = range(len(self))[at]
        return [self.example(number) for number in numbers] if isinstance(numbers, range) else self.example(numbers)

    def __iter__(self) -> Iterator[Example]:
        return map(self.example, range(len(self)))

    def example(self, number: int) -> Example:
        """The example of that number, which is from 0 to N - 1."""
        raise NotImplementedError


class _Taken(ExamplesView):
    def __init__(self, examples: Sequence[Example], numbers: NDArray[np.int64]) -> None:
        self._examples, self._numbers = examples, numbers
        self.facts = facts_of(examples)[numbers]

    def example(self, number: int) -> Example:
        return self._examples[int(self._numbers[number])]


class _Joined(ExamplesView):
    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.facts = np.concatenate([facts_of(part) for part in parts])

    def example(self, number: int) -> Example:
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        return self._parts[part][number - int(self._starts[part])]


def taken(examples: Sequence[Example], numbers: NDArray[np.int64]) -> Sequence[Example]:
    """The examples of these numbers, in their order."""
    if isinstance(examples, ExamplesView):
        return _Taken(examples, numbers)
    return _chosen(examples, numbers)


def joined(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """The examples of all ``parts``, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, ExamplesView) for part in parts):
        return _Joined(parts)
    return [example for part in parts for example in part]
