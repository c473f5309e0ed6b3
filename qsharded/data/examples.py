"""Examples: ids, and which of them are trained on; a dataset is a list of them."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
    """What the chat template leaves out of a dataset's rows, of one kind.

    Attributes:
        rows: in how many of them.
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
        empty: rows of blank text, left out.
        omitted: what the rows have and the examples lack, by its kind.
    """

    examples: Sequence[Example]
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    omitted: dict[str, Omitted] = field(default_factory=dict)

    def count_omission(self, kind: str, example: str) -> None:
        """Another row lacks something of ``kind``."""
        self.omitted.setdefault(kind, Omitted(0, example)).rows += 1

    def add(self, others: "Dataset") -> None:
        """Put the counts of later rows to those of these; the examples are the caller's business."""
        self.dropped += others.dropped
        self.truncated += others.truncated
        self.empty += others.empty
        for kind, omitted in others.omitted.items():
            self.omitted.setdefault(kind, Omitted(0, omitted.example)).rows += omitted.rows

    def to_json(self) -> dict[str, Any]:
        """All but the examples, as values of JSON."""
        counts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "examples"}
        return counts | {"omitted": {kind: asdict(omitted) for kind, omitted in self.omitted.items()}}

    @classmethod
    def from_json(cls, read: Mapping[str, Any], examples: Sequence[Example]) -> "Dataset":
        """The ``examples`` with what :meth:`to_json` gave."""
        omitted = {kind: Omitted(**one) for kind, one in read["omitted"].items()}
        return cls(examples, **{**read, "omitted": omitted})
