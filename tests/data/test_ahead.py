"""Making the next item while the present one is worked on."""

import threading
from collections.abc import Iterator

import pytest

from qsharded.data.ahead import one_ahead


def test_all_items_come_in_order() -> None:
    assert list(one_ahead(iter(range(50)))) == [*range(50)]
    assert list(one_ahead(iter(()))) == []


def test_the_next_one_is_made_meanwhile_and_none_beyond_it() -> None:
    made: list[int] = []
    second_is_made = threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 1:
                second_is_made.set()
            yield number

    taken = one_ahead(items())
    assert next(taken) == 0
    assert second_is_made.wait(10)  # though nobody has asked for it
    assert made == [0, 1]


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 2 is damaged")

    taken = one_ahead(items())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="row 2 is damaged"):
        next(taken)


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    taken = one_ahead(iter(range(10)))
    next(taken)
    taken.close()
    assert threading.active_count() == before
