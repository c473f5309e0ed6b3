"""Steps of training: which rows each optimizer step takes, and each rank's share of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from random import Random

import numpy as np

from qsharded.data.batches import Batch, make_batch
from qsharded.data.examples import Example
from qsharded.data.facts import group_starts, groups_among, lengths_of, trained_of
from qsharded.data.ragged import Numbers, Ragged
from qsharded.data.sequence_packing import pack
from qsharded.data.shuffling import shuffled


@dataclass(frozen=True)
class Cursor:
    """A place in the stream of rows: ``row`` rows of ``epoch`` are done, and all epochs before it."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimizer step.

    Attributes:
        micro_batches: as many on every rank, at least one.
        trained_tokens: the number of targets, of all ranks and micro-batches together.
        tokens: the number of tokens that are no padding, of all together.
        groups: the number of groups of examples, of all together; an example without a group is one.
        cursor: where to go on after this step.
    """

    micro_batches: list[Batch]
    trained_tokens: int
    tokens: int
    groups: int
    cursor: Cursor

    def pin_memory(self) -> "Step":
        """The step with its batches in page-locked memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass
class StepLoader:
    """Endless steps over ``examples``, in an order that depends on ``seed`` and epoch alone.

    A step takes the epoch's next ``world_size * batch_size * accumulation`` rows, however that number is made up: runs
    on other numbers of ranks have the same documents in each step. An epoch's last step takes the rows that are left.

    Attributes:
        examples: the same list on every rank. A group's are documents of one row; they have at most ``max_length``
            tokens together.
        max_length: of a row, in tokens.
        packing: whether a row holds as many documents as fit; else it holds one, or one group.
        batch_size: rows of a micro-batch on one rank.
        accumulation: micro-batches of a step.
        rank: this process's number, from 0.
        world_size: how many processes share each step.
        seed: of the order.
        pad_id: the id that fills rows up.
        shuffle: whether each epoch has an order of its own; else rows come as given.
        draw: from an epoch to the numbers of the examples that it takes, as many in each; None: each takes all.

    Raises:
        ValueError: no examples, one longer than ``max_length``, a count below 1, or groups that ``draw`` could part.
    """

    examples: Sequence[Example]
    _: KW_ONLY
    max_length: int
    packing: bool
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    pad_id: int
    shuffle: bool = True
    draw: Callable[[int], Sequence[int]] | None = None
    _rows_of: tuple[int, Ragged] | None = field(default=None, init=False, repr=False)
    _row_counts: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"
        for name in ("max_length", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.examples:
            raise ValueError("there are no examples to make steps of")
        groups = self._groups()
        tokens = groups.sums(lengths_of(self.examples))
        longest = int(tokens.argmax())
        if tokens[longest] > self.max_length:
            count = len(groups[longest])
            what = f"{'an example' if count == 1 else f'a group of {count} examples'} of {tokens[longest]} tokens"
            raise ValueError(f"{what} does not fit into rows of max_length {self.max_length}")
        if self.draw is not None and len(groups) < len(self.examples):
            raise ValueError("weights draw single examples, which would part groups: give the datasets no weights")

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, all ranks together."""
        return self.world_size * self.batch_size * self.accumulation

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of that epoch."""
        return -(-self._row_count(epoch) // self.rows_per_step)

    def steps(self, cursor: Cursor = Cursor()) -> Iterator[Step]:
        """The steps from ``cursor`` on, epoch after epoch without end.

        Raises:
            ValueError: the epoch has fewer rows than ``cursor`` has done: it comes from a run on other data.
        """
        self._check(cursor)
        while True:
            while cursor.row < self._row_count(cursor.epoch):
                step = self._step(cursor)
                yield step
                cursor = step.cursor
            cursor = Cursor(cursor.epoch + 1)

    def rows_from(self, cursor: Cursor, most: int) -> list[Numbers]:
        """The numbers of the examples in each of the epoch's next rows, of up to so many.

        Raises:
            ValueError: as :meth:`steps`.
        """
        self._check(cursor)
        rows = self._rows(cursor.epoch)
        return [rows[row] for row in range(cursor.row, min(cursor.row + most, len(rows)))]

    def step_of(self, rows: list[Numbers], cursor: Cursor) -> Step:
        """The step of these rows, of which there is one at least, with ``cursor`` behind it."""
        documents = np.concatenate(rows)
        return Step(
            micro_batches=[self._batch(mine) for mine in self._share(rows)],
            trained_tokens=int(trained_of(self.examples, documents).sum()),
            tokens=int(lengths_of(self.examples, documents).sum()),
            groups=sum(groups_among(self.examples, row) for row in rows),
            cursor=cursor,
        )

    def _check(self, cursor: Cursor) -> None:
        if cursor.row > self._row_count(cursor.epoch):
            raise ValueError(f"cannot resume at {cursor}: the epoch has {self._row_count(cursor.epoch)} rows")

    def _row_count(self, epoch: int) -> int:
        if self.draw is None or not self.packing:
            epoch = 0  # all have as many: packing's rows depend in number on the lengths alone
        if epoch not in self._row_counts:
            self._row_counts[epoch] = len(self._rows(epoch))
        return self._row_counts[epoch]

    def _rows(self, epoch: int) -> Ragged:
        """The numbers of the examples in each row of that epoch."""
        found = self._rows_of  # read once: another thread may be an epoch ahead
        if found is None or found[0] != epoch:
            found = self._rows_of = (epoch, self._make_rows(epoch))
        return found[1]

    def _make_rows(self, epoch: int) -> Ragged:
        # Python's own generator: its shuffle is the same in all versions, as resuming elsewhere needs.
        random = Random(f"rows {self.seed} {epoch}")
        groups = self._groups() if self.draw is None else _alone(np.asarray(self.draw(epoch), np.int64))
        if self.shuffle:
            groups = groups.taken(shuffled(len(groups), random))
        if not self.packing:
            return groups
        rows = pack(groups.sums(lengths_of(self.examples)), self.max_length)
        if self.shuffle:
            rows = rows.taken(shuffled(len(rows), random))  # packed ones come by the length of their first document
        return rows.replaced(groups)

    def _groups(self) -> Ragged:
        return Ragged(np.arange(len(self.examples)), group_starts(self.examples))

    def _step(self, cursor: Cursor) -> Step:
        end = cursor.row + self.rows_per_step
        behind = Cursor(cursor.epoch, end) if end < self._row_count(cursor.epoch) else Cursor(cursor.epoch + 1)
        return self.step_of(self.rows_from(cursor, self.rows_per_step), behind)

    def _batch(self, rows: list[Numbers]) -> Batch:
        examples = [[self.examples[number] for number in row.tolist()] for row in rows]
        return make_batch(examples, pad_id=self.pad_id, max_length=self.max_length)

    def _share(self, rows: list[Numbers]) -> list[list[Numbers]]:
        """This rank's rows of each micro-batch, all alike in length across ranks: padding and waiting cost the least.

        A step short of rows has fewer micro-batches; in its last some ranks may have fewer rows than others, or none.
        """
        by_length = sorted(rows, key=lambda row: -lengths_of(self.examples, row).sum())
        size = self.world_size * self.batch_size
        return [by_length[start : start + size][self.rank :: self.world_size] for start in range(0, len(rows), size)]


def _alone(numbers: Numbers) -> Ragged:
    return Ragged(numbers, np.arange(len(numbers) + 1))
