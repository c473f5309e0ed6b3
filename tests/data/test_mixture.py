"""Several datasets as one: shares, epochs, and what is held out."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise

import pytest

from qsharded.data import Cursor, Dataset, Example, Mixture, StepLoader
from qsharded.data.held_out import split_examples


def row(number: int) -> Example:
    return Example([number] + [0] * (1 + number % 8), [True] * (2 + number % 8))


def mixture(sizes: Sequence[int], weights: Sequence[float] | None = None) -> Mixture:
    """Rows of 2 to 9 tokens whose first ids number them, over all datasets."""
    starts = [*accumulate(sizes, initial=0)]
    parts = {
        f"d{part}": Dataset([row(number) for number in range(*bounds)]) for part, bounds in enumerate(pairwise(starts))
    }
    return Mixture(parts, weights)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([5, 9], None, [5, 9]),
        ([5, 9], [1, 1], [5, 5]),
        ([100, 50], [0.7, 0.3], [100, 43]),  # 42.9
        ([100, 50], [7, 3], [100, 43]),
        ([100, 30], [0.7, 0.3], [70, 30]),
        ([3000, 1000, 500], [0.5, 0.3, 0.2], [1250, 750, 500]),
        ([10, 1000], [1e-300, 1], [1, 1000]),  # of a share below half a row one row
        ([10, 1000], [1, 1e-300], [10, 1]),
        ([10, 10], [1e-320, 1e-320], [10, 10]),
        ([10, 20], [1e308, 1e308], [10, 10]),
        ([7], [0.3], [7]),
    ],
)
def test_an_epoch_is_the_most_rows_of_these_shares_without_one_twice(
    sizes: list[int], weights: list[float] | None, expected: list[int]
) -> None:
    assert mixture(sizes, weights).rows_an_epoch() == expected


def parts_drawn(mixed: Mixture, epoch: int, seed: int = 3) -> list[set[int]]:
    """The rows of each dataset in an epoch, none of them twice."""
    draw = mixed.draw(seed)
    assert draw is not None
    drawn = draw(epoch)
    assert len(set(drawn)) == len(drawn)
    starts = accumulate((len(part.examples) for part in mixed.parts.values()), initial=0)
    return [{n for n in drawn if a <= n < b} for a, b in pairwise(starts)]


def test_epochs_take_turns_with_the_rows_of_the_larger_dataset() -> None:
    mixed = mixture([4, 14], [1, 1])
    epochs = [parts_drawn(mixed, epoch) for epoch in range(6)]
    assert all(few == set(range(4)) for few, _ in epochs)
    for a_pass in (epochs[:3], epochs[3:]):  # 14 rows are three times 4, and 2 that wait
        counts = Counter(row for _, many in a_pass for row in many)
        assert (len(counts), max(counts.values())) == (12, 1)
    assert epochs[0] != epochs[3]


def test_rows_are_drawn_by_seed_and_epoch_alone() -> None:
    mixed = mixture([4, 14], [1, 1])
    later = [parts_drawn(mixed, epoch) for epoch in (5, 2, 0)]
    again = mixture([4, 14], [1, 1])
    assert later == [parts_drawn(again, epoch) for epoch in (5, 2, 0)]
    assert parts_drawn(mixed, 0, seed=3) != parts_drawn(mixed, 0, seed=4)


def test_equal_datasets_are_drawn_from_apart() -> None:
    """Two translations of one text, say: one order for both would give the same sentences in the same epoch."""
    _, first, second = parts_drawn(mixture([2, 40, 40], [1, 10, 10]), 0)
    assert {n - 2 for n in first} != {n - 42 for n in second}


def loader(mixed: Mixture, rank: int, world_size: int, *, packing: bool, rows: int = 6) -> StepLoader:
    return StepLoader(
        mixed.examples,
        max_length=12,
        packing=packing,
        batch_size=1,
        accumulation=rows // world_size,
        rank=rank,
        world_size=world_size,
        seed=5,
        pad_id=0,
        draw=mixed.draw(5),
    )


def ids_of_steps(mixed: Mixture, world_size: int, count: int, *, packing: bool) -> list[Counter[int]]:
    """The rows' numbers in each of the first steps, of all ranks together: where a position is 0, a row begins."""
    steps = [loader(mixed, rank, world_size, packing=packing).steps() for rank in range(world_size)]
    found = []
    for _ in range(count):
        batches = [batch for ranks in steps for batch in next(ranks).micro_batches]
        begins = [(batch.positions == 0) & (batch.targets != -100) for batch in batches]
        found.append(Counter(int(n) for batch, at in zip(batches, begins, strict=True) for n in batch.input_ids[at]))
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_steps_hold_what_the_epochs_draw_for_any_number_of_ranks(packing: bool) -> None:
    """Packed, the rows of an epoch are as many as its documents' lengths make them, other numbers in other epochs."""
    mixed = mixture([6, 33], [2, 5])
    draw = mixed.draw(5)
    assert draw is not None
    one = loader(mixed, 0, 1, packing=packing)
    in_epoch = [one.steps_in_epoch(epoch) for epoch in range(4)]
    alone = ids_of_steps(mixed, 1, sum(in_epoch), packing=packing)
    assert ids_of_steps(mixed, 3, sum(in_epoch), packing=packing) == alone
    for epoch, count in enumerate(in_epoch):
        seen = sum((alone.pop(0) for _ in range(count)), Counter())
        assert seen == Counter(draw(epoch))


def test_an_epoch_ends_with_its_own_packed_rows() -> None:
    """Even epochs draw two documents that share a row, odd ones two that fill a row each; a step is one row."""
    made = loader(mixture([1]), 0, 1, packing=True, rows=1)
    made.examples = [Example([n] * length, [True] * length) for n, length in enumerate((6, 6, 12, 12))]
    made.draw = lambda epoch: [2, 3] if epoch % 2 else [0, 1]
    assert [made.steps_in_epoch(epoch) for epoch in range(4)] == [1, 2, 1, 2]
    cursors = [step.cursor for step in islice(made.steps(), 4)]
    assert cursors == [Cursor(1, 0), Cursor(1, 1), Cursor(2, 0), Cursor(3, 0)]
    assert next(made.steps(Cursor(1, 2))).cursor == Cursor(3, 0)
    with pytest.raises(ValueError, match="the epoch has 1 rows"):
        next(made.steps(Cursor(2, 2)))


def test_without_weights_all_rows_come_in_the_order_of_the_datasets() -> None:
    mixed = mixture([3, 2])
    assert mixed.draw(1) is None
    assert [int(example.ids[0]) for example in mixed.examples] == [0, 1, 2, 3, 4]


def test_each_dataset_gives_its_part_to_evaluation() -> None:
    mixed = mixture([40, 10, 2], [1, 2, 3])
    kept, held_out = mixed.split(0.2, seed=7)
    assert [len(part.examples) for part in kept.parts.values()] == [32, 8, 1]
    assert kept.weights == [1, 2, 3]
    numbers = [int(example.ids[0]) for example in held_out.examples]
    assert [sum(a <= n < b for n in numbers) for a, b in ((0, 40), (40, 50), (50, 52))] == [8, 2, 1]
    assert sorted(numbers + [int(example.ids[0]) for example in kept.examples]) == list(range(52))


def test_one_dataset_is_split_as_ever() -> None:
    mixed = mixture([20])
    kept, held_out = mixed.split(0.3, seed=2)
    expected = split_examples(mixed.parts["d0"], 0.3, 2)
    assert (kept.examples, held_out.examples) == tuple(part.examples for part in expected)


def test_a_dataset_too_small_to_be_split_is_named() -> None:
    with pytest.raises(ValueError, match="d1: the dataset has 1 example, too few to hold any out for evaluation"):
        mixture([20, 1]).split(0.3, seed=2)
