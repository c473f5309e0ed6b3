from random import Random

import pytest

from qsharded.data.shuffling import shuffled


@pytest.mark.parametrize("counts", [range(70), [127, 128, 129, 1000, 65_536, 100_003]])
def test_the_order_and_what_comes_after_are_those_of_python(counts):
    for count in counts:
        theirs, ours = Random(f"seed {count}"), Random(f"seed {count}")
        expected = list(range(count))
        theirs.shuffle(expected)
        assert shuffled(count, ours).tolist() == expected
        assert ours.getstate() == theirs.getstate()
