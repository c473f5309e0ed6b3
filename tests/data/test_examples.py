import numpy as np
import pytest

from qsharded.data import Dataset, Example, split_examples


def dataset(count):
    return Dataset([Example([number, 1], [True, True]) for number in range(count)], dropped=3, truncated=2, empty=1)


def numbers(part):
    return [int(example.ids[0]) for example in part.examples]


def test_the_first_id_is_never_counted_as_trained():
    assert Example([5, 6, 7], [True, False, True]).trained_tokens == 1
    assert Example([5], [True]).trained_tokens == 0


def test_an_example_holds_compact_arrays():
    example = Example([5, 6], [False, True])
    assert (example.ids.dtype, example.trained.dtype, len(example)) == (np.int32, np.bool_, 2)


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(100, 0.1, 10), (100, 0.254, 25), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_splits_have_their_sizes_and_share_nothing(count, fraction, held_out):
    train, evaluation = split_examples(dataset(count), fraction, seed=0)
    assert len(evaluation.examples) == held_out
    assert sorted(numbers(train) + numbers(evaluation)) == list(range(count))
    assert numbers(train) == sorted(numbers(train))
    assert numbers(evaluation) == sorted(numbers(evaluation))


def test_splits_depend_on_the_seed_alone():
    first, again, other = (split_examples(dataset(50), 0.2, seed) for seed in (7, 7, 8))
    assert numbers(first[1]) == numbers(again[1])
    assert numbers(first[1]) != numbers(other[1])


def test_counts_stay_with_the_training_part():
    train, evaluation = split_examples(dataset(5), 0.2, seed=0)
    assert (train.dropped, train.truncated, train.empty) == (3, 2, 1)
    assert (evaluation.dropped, evaluation.truncated, evaluation.empty) == (0, 0, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_out_of_range(fraction):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
        split_examples(dataset(5), fraction, seed=0)


def test_too_few_to_split():
    with pytest.raises(ValueError, match="has 1 example, too few"):
        split_examples(dataset(1), 0.5, seed=0)
