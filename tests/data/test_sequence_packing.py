import random

import pytest

from qsharded.data import sequence_packing


def pack(lengths, capacity):
    return [row.tolist() for row in sequence_packing.pack(lengths, capacity)]


def lengths_like_a_chat_dataset(rng, count, capacity):
    """Log-normal, as lengths of conversations are: many of some hundred tokens, a few that fill a row."""
    return [min(max(int(rng.lognormvariate(5.8, 0.9)), 8), capacity) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_every_document_stands_whole_in_one_row(seed):
    rng = random.Random(seed)
    capacity = rng.randint(1, 60)
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 200))]
    rows = pack(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= capacity for row in rows)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_as_full_as_by_the_plain_search(seed):
    rng = random.Random(seed)
    capacity = rng.randint(5, 60)
    lengths = [rng.randint(1, capacity) for _ in range(150)]
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda number: fills[number])] += length
        else:
            fills.append(length)
    packed = [sum(lengths[document] for document in row) for row in pack(lengths, capacity)]
    assert sorted(packed) == sorted(fills)


def test_best_fit_by_hand():
    # 6 and 5 open rows; 4 fills the first to the brim; 3 goes to the second, where 2 then fits too.
    assert pack([3, 6, 2, 5, 4], 10) == [[1, 4], [3, 0, 2]]
    # The fullest row with room is taken, not the first.
    assert pack([5, 6, 3], 9) == [[1, 2], [0]]


def test_equal_lengths_keep_their_order():
    assert pack([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("capacity", [1024, 2048, 8192])
def test_rows_are_nearly_full(capacity):
    lengths = lengths_like_a_chat_dataset(random.Random(0), 20_000, capacity)
    rows = pack(lengths, capacity)
    assert sum(lengths) / (len(rows) * capacity) > 0.99


def test_the_number_of_rows_does_not_depend_on_the_order():
    rng = random.Random(1)
    lengths = lengths_like_a_chat_dataset(rng, 2_000, 1024)
    count = len(pack(lengths, 1024))
    rng.shuffle(lengths)
    assert len(pack(lengths, 1024)) == count


def test_a_hundred_thousand_documents():
    # Under a second; a search through all rows for each document would be killed by the suite's time limit.
    rows = pack(lengths_like_a_chat_dataset(random.Random(2), 100_000, 2048), 2048)
    assert sum(map(len, rows)) == 100_000
