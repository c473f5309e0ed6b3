"""Examples: ids, and which of them are trained on; a dataset is a list of them."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsharded.data.bad_rows import SHOWN, clipped
from qsharded.data.omissions import Omission


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
        columns: those that a reading was told to take, less the ones that no row has.
    """

    examples: Sequence[Example]
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    omitted: dict[str, Omitted] = field(default_factory=dict)
    bad: int = 0
    bad_reasons: list[str] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)

    def count_omission(self, kind: str, example: str) -> None:
        """Another row lacks something of ``kind``."""
        self.omitted.setdefault(kind, Omitted(0, example)).rows += 1

    def count_omissions(self, origin: str, found: Iterable[Omission]) -> None:
        """The row at ``origin`` lacks these; each kind is counted once."""
        for kind, first in {one.kind: one for one in reversed([*found])}.items():
            self.count_omission(kind, f"{origin}, {first}")

    def count_bad(self, reason: str) -> None:
        """Another row cannot be used."""
        self.bad += 1
        if len(self.bad_reasons) < SHOWN:
            self.bad_reasons.append(clipped(reason))

    def add(self, others: "Dataset") -> None:
        """Put the counts of later rows to those of these; the examples are the caller's business."""
        self.dropped += others.dropped
        self.truncated += others.truncated
        self.empty += others.empty
        self.bad += others.bad
        self.bad_reasons += others.bad_reasons[: SHOWN - len(self.bad_reasons)]
        self.columns |= others.columns
        for kind, omitted in others.omitted.items():
            self.omitted.setdefault(kind, Omitted(0, omitted.example)).rows += omitted.rows

    def to_json(self) -> dict[str, Any]:
        """All but the examples, as values of JSON."""
        counts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "examples"}
        omitted = {kind: asdict(omitted) for kind, omitted in self.omitted.items()}
        return counts | {"omitted": omitted, "columns": sorted(self.columns)}

    @classmethod
    def from_json(cls, read: Mapping[str, Any], examples: Sequence[Example]) -> "Dataset":
        """The ``examples`` with what :meth:`to_json` gave."""
        omitted = {kind: Omitted(**one) for kind, one in read["omitted"].items()}
        return cls(examples, **{**read, "omitted": omitted, "columns": set(read["columns"])})
