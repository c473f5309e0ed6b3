"""Reading ahead: order, how far ahead, errors in their turn, and threads that end."""

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from qsharded.checkpoint import read_ahead

CPU = torch.device("cpu")


def fill_with(value: int, raw: Tensor) -> None:
    raw.fill_(value)


def test_every_size_comes_in_order() -> None:
    sizes = [3, 0, 7, 1, 5, 2, 9, 4, 6]
    fills = [partial(fill_with, value) for value in range(len(sizes))]
    read = [raw.clone() for raw in read_ahead.read_ahead(fills, sizes, CPU)]
    assert [raw.tolist() for raw in read] == [[value] * size for value, size in enumerate(sizes)]


def test_nothing_to_read() -> None:
    assert list(read_ahead.read_ahead([], [], CPU)) == []


def test_it_reads_ahead_by_the_buffers_and_no_further() -> None:
    """While the first is worked on, all buffers but its own are filled; its own is not touched."""
    filled: set[int] = set()
    ahead = threading.Event()

    def fill(number: int, raw: Tensor) -> None:
        raw.fill_(number)
        filled.add(number)
        if filled >= {0, 1, 2, 3}:
            ahead.set()

    stream = read_ahead.read_ahead([partial(fill, number) for number in range(9)], [2] * 9, CPU)
    first = next(stream)
    assert ahead.wait(60)
    assert filled == {0, 1, 2, 3}
    assert first.tolist() == [0, 0]
    assert [raw.tolist() for raw in stream] == [[number] * 2 for number in range(1, 9)]


def test_an_error_is_raised_in_its_turn_and_the_threads_end() -> None:
    def refuse(raw: Tensor) -> None:
        raise ValueError("the disk is gone")

    before = threading.active_count()
    stream = read_ahead.read_ahead([partial(fill_with, 1), refuse, partial(fill_with, 3)], [1, 1, 1], CPU)
    assert next(stream).tolist() == [1]
    with pytest.raises(ValueError, match="the disk is gone"):
        next(stream)
    assert threading.active_count() == before


def test_a_closed_stream_leaves_no_thread() -> None:
    before = threading.active_count()
    stream = read_ahead.read_ahead([partial(fill_with, 1)] * 20, [1] * 20, CPU)
    next(stream)
    stream.close()
    assert threading.active_count() == before


@pytest.mark.gpu
def test_on_a_gpu_a_buffer_waits_for_its_copy() -> None:
    """More pieces than buffers, each large enough to be under way while the next is read."""
    device = torch.device("cuda")
    size, count = 32 << 20, 24
    fills = [partial(fill_with, number) for number in range(count)]
    kept = [raw for raw in read_ahead.read_ahead(fills, [size] * count, device)]
    for number, raw in enumerate(kept):
        assert raw.device.type == "cuda"
        assert bool((raw == number).all())
