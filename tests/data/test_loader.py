import random
from collections import Counter
from itertools import islice

import pytest
import torch

from qsharded.data import Cursor, Dataset, Example, StepLoader, split_examples

MAX_LENGTH = 32


def make_examples(seed, count=60):
    """Examples that are told apart by their ids."""
    rng = random.Random(seed)
    ids = iter(range(10**6))
    lengths = [rng.randint(2, MAX_LENGTH) for _ in range(count)]
    return [
        Example([next(ids) for _ in range(n)], [rng.random() < 0.6 for _ in range(n - 1)] + [True]) for n in lengths
    ]


def make_loader(examples, rank=0, world_size=1, accumulation=1, batch_size=1, packing=True, seed=5, shuffle=True):
    return StepLoader(
        examples,
        max_length=MAX_LENGTH,
        packing=packing,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        pad_id=0,
        shuffle=shuffle,
    )


def document_ids(batch):
    """Each position's document, -1 in padding. Where the batch tells none, positions do: no document is one token."""
    if batch.document_ids is not None:
        return batch.document_ids
    last_B1 = batch.positions.max(dim=1, keepdim=True).values
    inside_BS = (torch.arange(batch.positions.shape[1]) <= last_B1) & (last_B1 > 0)
    return torch.where(inside_BS, 0, -1)


def documents(steps):
    """What the model sees in one step of all ranks: for each document its ids, positions and targets."""
    found = Counter()
    for batch in (batch for step in steps for batch in step.micro_batches):
        for row in zip(batch.input_ids, batch.positions, batch.targets, document_ids(batch), strict=True):
            ids, positions, targets, numbers = row
            for number in set(numbers.tolist()) - {-1}:
                parts = (part[numbers == number].tolist() for part in (ids, positions, targets))
                found[tuple(map(tuple, parts))] += 1
    return found


def all_steps(examples, count, world_size, **options):
    """The first ``count`` steps, each as the list of what its ranks get."""
    loaders = [make_loader(examples, rank, world_size, **options) for rank in range(world_size)]
    return list(islice(zip(*(loader.steps() for loader in loaders), strict=True), count))


def expected_documents(examples):
    return Counter(
        (
            tuple(example.ids.tolist()),
            tuple(range(len(example))),
            (
                *(int(i) if s else -100 for i, s in zip(example.ids[1:], example.trained[1:], strict=True)),
                -100,
            ),
        )
        for example in examples
    )


SPLITS_OF_12 = [
    (world, accumulation, 12 // world // accumulation)
    for world, accumulation in [(1, 1), (1, 12), (12, 1), (2, 3), (3, 2), (4, 3), (6, 1), (1, 4), (2, 6)]
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_steps_have_the_same_documents_however_they_are_split(packing, seed):
    examples = make_examples(seed, count=70)
    views = []
    for world_size, accumulation, batch_size in SPLITS_OF_12:
        steps = all_steps(
            examples, 12, world_size, accumulation=accumulation, batch_size=batch_size, packing=packing, seed=seed
        )
        views.append([(documents(ranks), ranks[0].trained_tokens, ranks[0].tokens, ranks[0].cursor) for ranks in steps])
    assert all(view == views[0] for view in views)
    assert len({str(sorted(found)) for found, *_ in views[0]}) > 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), SPLITS_OF_12)
def test_an_epoch_has_every_document_once(packing, world_size, accumulation, batch_size):
    examples = make_examples(0)
    options = {"accumulation": accumulation, "batch_size": batch_size, "packing": packing}
    count = make_loader(examples, world_size=world_size, **options).steps_in_epoch(0)
    steps = all_steps(examples, count, world_size, **options)
    assert sum((documents(ranks) for ranks in steps), Counter()) == expected_documents(examples)
    assert steps[-1][0].cursor == Cursor(1, 0)
    assert all(ranks[0].cursor.epoch == 0 for ranks in steps[:-1])


@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), SPLITS_OF_12)
def test_every_rank_runs_the_same_number_of_batches_and_knows_the_global_counts(world_size, accumulation, batch_size):
    examples = make_examples(1, count=31)  # 31 rows: the last step of the epoch is short by 5
    for ranks in all_steps(examples, 4, world_size, accumulation=accumulation, batch_size=batch_size, packing=False):
        batches = [batch for step in ranks for batch in step.micro_batches]
        assert {len(step.micro_batches) for step in ranks} == {len(ranks[0].micro_batches)}
        assert 1 <= len(ranks[0].micro_batches) <= accumulation
        assert max(len(batch.input_ids) for batch in batches) <= batch_size
        trained = sum(int((batch.targets != -100).sum()) for batch in batches)
        tokens = sum(int((document_ids(batch) != -1).sum()) for batch in batches)
        assert {(step.trained_tokens, step.tokens) for step in ranks} == {(trained, tokens)}
        assert len({step.cursor for step in ranks}) == 1


def test_a_rank_short_of_rows_gets_padding():
    (ranks,) = all_steps(make_examples(0, count=1), 1, world_size=3)
    assert [bool((document_ids(step.micro_batches[0]) == -1).all()) for step in ranks] == [False, True, True]


def test_a_short_step_has_no_more_micro_batches_than_it_needs():
    (ranks,) = all_steps(make_examples(0, count=3), 1, world_size=2, accumulation=4, packing=False)
    assert [len(step.micro_batches) for step in ranks] == [2, 2]


def same(one, other):
    fields = ("trained_tokens", "tokens", "cursor")
    equal = all(getattr(one, field) == getattr(other, field) for field in fields)
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    return equal and all(all(map(torch.equal, tensors(left), tensors(right))) for left, right in pairs)


def tensors(batch):
    return batch.input_ids, batch.targets, batch.positions, document_ids(batch)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_gives_the_remaining_steps(packing, rank):
    examples = make_examples(2, count=50)
    options = {"rank": rank, "world_size": 2, "accumulation": 2, "packing": packing}
    steps = list(islice(make_loader(examples, **options).steps(), 25))
    assert steps[-1].cursor.epoch >= 1
    for done, step in enumerate(steps[:-1], 1):
        (following,) = islice(make_loader(examples, **options).steps(step.cursor), 1)
        assert same(following, steps[done])


def test_a_cursor_serves_other_numbers_of_ranks():
    examples = make_examples(3, count=50)
    (first,) = islice(make_loader(examples, batch_size=6).steps(), 1)
    after = islice(make_loader(examples, batch_size=6).steps(), 1, None)
    ranks = zip(*(make_loader(examples, rank, 3, 2).steps(first.cursor) for rank in range(3)), strict=True)
    for step, share in islice(zip(after, ranks, strict=False), 10):
        assert documents([step]) == documents(share)


def test_epochs_and_seeds_have_orders_of_their_own():
    examples = make_examples(4)

    def order(seed, epoch, packing, **options):
        loader = make_loader(examples, seed=seed, packing=packing, **options)
        steps = islice(loader.steps(Cursor(epoch)), loader.steps_in_epoch(epoch))
        return [tuple(batch.input_ids.flatten().tolist()) for step in steps for batch in step.micro_batches]

    for packing in (False, True):
        assert order(0, 0, packing) == order(0, 0, packing)
        assert order(0, 0, packing) != order(0, 1, packing)
        assert order(0, 0, packing) != order(1, 0, packing)
        assert order(0, 0, packing, shuffle=False) == order(1, 1, packing, shuffle=False)


def test_without_shuffling_rows_come_as_given():
    examples = make_examples(5, count=10)
    steps = islice(make_loader(examples, packing=False, shuffle=False).steps(), 20)
    firsts = [int(step.micro_batches[0].input_ids[0, 0]) for step in steps]
    assert firsts == [int(example.ids[0]) for example in examples] * 2


@pytest.mark.parametrize("packing", [False, True])
def test_steps_in_epoch_is_where_the_epoch_ends(packing):
    loader = make_loader(make_examples(6, count=33), accumulation=4, packing=packing)
    for epoch in range(3):
        epochs = [step.cursor.epoch for step in islice(loader.steps(Cursor(epoch)), loader.steps_in_epoch(epoch))]
        assert epochs == [epoch] * (len(epochs) - 1) + [epoch + 1]


def test_packing_puts_several_documents_in_a_row():
    examples = make_examples(7, count=40)
    rows = -(-sum(map(len, examples)) // MAX_LENGTH)
    assert rows <= make_loader(examples).steps_in_epoch(0) <= rows * 1.1
    assert make_loader(examples, packing=False).steps_in_epoch(0) == 40


def test_micro_batches_hold_rows_of_like_length():
    """Else each would be as wide as the longest row of the step."""
    examples = [Example([1] * n, [True] * n) for n in (8, 16, 24, 32) * 4]
    (ranks,) = all_steps(examples, 1, world_size=2, accumulation=4, batch_size=2, packing=False)
    longest = [[int(batch.positions.max()) + 1 for batch in step.micro_batches] for step in ranks]
    assert longest == [[32, 24, 16, 8]] * 2


def test_ranks_share_long_and_short_rows():
    examples = [Example([1] * n, [True] * n) for n in (32, 24, 16, 8)]
    (ranks,) = all_steps(examples, 1, world_size=2, batch_size=2, packing=False)
    assert [[int((row != -1).sum()) for row in document_ids(step.micro_batches[0])] for step in ranks] == [
        [32, 16],
        [24, 8],
    ]


def test_packed_rows_come_in_no_order_of_length():
    longest = [int(step.micro_batches[0].positions.max()) for step in islice(make_loader(make_examples(8)).steps(), 20)]
    assert longest != sorted(longest, reverse=True)


def test_a_cursor_behind_the_epoch_is_refused():
    loader = make_loader(make_examples(0, count=10), packing=False)
    assert next(loader.steps(Cursor(0, 10))).cursor == Cursor(1, 1)
    with pytest.raises(ValueError, match=r"cannot resume at Cursor\(epoch=0, row=11\): the epoch has 10 rows"):
        next(loader.steps(Cursor(0, 11)))


@pytest.mark.parametrize(
    ("examples", "options", "reason"),
    [
        ([], {}, "no examples"),
        ([Example([1] * 33, [True] * 33)], {}, "an example of 33 tokens does not fit into rows of max_length 32"),
        (make_examples(0, 1), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (make_examples(0, 1), {"accumulation": -1}, "accumulation must be at least 1, got -1"),
    ],
)
def test_arguments_out_of_range(examples, options, reason):
    with pytest.raises(ValueError, match=reason):
        make_loader(examples, **options)


def make_pairs(count=30):
    """Two neighbours each, told apart by their ids: 2n and 2n + 1 are a pair. Between them single examples."""
    rng = random.Random(7)
    examples = []
    for number in range(count):
        for half in (0, 1):
            length = rng.randint(2, MAX_LENGTH // 2)
            examples.append(Example([2 * number + half] * length, [True] * length, group=f"pair {number}"))
        examples.append(Example([1000 + number] * 3, [True] * 3))
    return examples


def row_ids(batch):
    """Of each row, its documents' ids in their order."""
    numbers_BS = document_ids(batch)
    return [
        list(dict.fromkeys(ids[numbers >= 0].tolist()))
        for ids, numbers in zip(batch.input_ids, numbers_BS, strict=True)
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_groups_examples_are_neighbours_of_one_row(packing, world_size):
    examples, seen, groups = make_pairs(), Counter(), 0
    for rank in range(world_size):
        loader = make_loader(examples, rank, world_size, packing=packing, batch_size=2)
        for step in islice(loader.steps(), loader.steps_in_epoch(0)):
            groups += step.groups
            for row in (row for batch in step.micro_batches for row in row_ids(batch)):
                seen.update(row)
                firsts = [at for at, number in enumerate(row) if number < 1000 and number % 2 == 0]
                assert all(row[at + 1] == row[at] + 1 for at in firsts)
                assert packing or len(row) == (2 if firsts else 1)
    assert seen == Counter(example.ids[0] for example in examples)
    assert groups == 60 * world_size  # every rank is told of all


def test_a_group_that_no_row_holds_or_that_weights_could_part_is_refused():
    halves = [Example([n] * 20, [True] * 20, group="pair") for n in (1, 2)]
    with pytest.raises(ValueError, match="a group of 2 examples of 40 tokens does not fit into rows of max_length 32"):
        make_loader(halves)
    with pytest.raises(ValueError, match="would part groups"):
        StepLoader(
            make_pairs(),
            max_length=MAX_LENGTH,
            packing=True,
            batch_size=1,
            accumulation=1,
            rank=0,
            world_size=1,
            seed=0,
            pad_id=0,
            draw=lambda epoch: [0],
        )


def test_a_group_is_held_out_whole():
    kept, held_out = split_examples(Dataset(make_pairs()), 0.3, seed=1)
    sides = [Counter(e.group for e in part.examples if e.group) for part in (kept, held_out)]
    assert set(sides[0].values()) == set(sides[1].values()) == {2}
    assert not sides[0].keys() & sides[1].keys()
    assert len(held_out.examples) > 18  # of 60 groups 18, some of them pairs
