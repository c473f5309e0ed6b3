import numpy as np
import pytest

from qsharded.data import Example
from qsharded.data.facts import ExamplesView, facts_of
from qsharded.data.shown.statistics import Bin, Statistics


def of(*lengths):
    return Statistics.of([Example([1] * length, [True] * length) for length in lengths])


def test_the_numbers_of_tokens_and_of_trained_ones():
    examples = [
        Example([1] * 10, [False] * 6 + [True] * 4),
        Example([1] * 30, [False] * 30),
        Example([1] * 20, [True] * 20),
    ]
    # The first token is predicted by nothing, so it is not trained whatever its flag says.
    assert Statistics.of(examples).line() == (
        "60 tokens, 23 of them trained (38.3%); a row has 10 to 30, the median is 20"
    )


def test_examples_on_the_disk_are_not_read():
    class Unread(ExamplesView):
        facts = facts_of([Example([1] * 10, [True] * 10), Example([1] * 20, [False] * 18 + [True] * 2)])

    assert Statistics.of(Unread()).line().startswith("30 tokens, 11 of them trained")


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_bin_and_all_are_of_one_width(seed):
    lengths = np.random.default_rng(seed).integers(2, 2 + 10**seed, size=50)
    bins = of(*lengths.tolist()).histogram()
    assert sum(one.rows for one in bins) == 50
    assert len({one.most - one.least for one in bins}) == 1
    assert [one.least for one in bins[1:]] == [one.most + 1 for one in bins[:-1]]
    assert len(bins) <= 8
    assert bins[0].least == lengths.min()
    for one in bins:
        assert one.rows == ((lengths >= one.least) & (lengths <= one.most)).sum()


def test_rows_of_one_length_are_one_bin():
    assert of(7, 7).histogram() == [Bin(7, 7, 2)]
