"""Packing: documents of many lengths into few rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qsharded.data.ragged import Numbers, Ragged


def pack(lengths: Sequence[int] | Numbers, capacity: int) -> Ragged:
    """Best-fit decreasing: each document, the longest first, goes to the fullest row that has room for it.

    The number of rows depends on the lengths alone, not on their order, and is at most 11/9 of the least possible plus
    4 (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). Documents of
    one length are placed together, rows of one room at a time: a million take well under a second.

    Args:
        lengths: of the documents, each from 1 to ``capacity``; of equal ones the earlier comes first.
        capacity: of a row.

    Returns:
        For each row the numbers of its documents; each document stands in one row, whole.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= capacity), "checked by the caller"
    documents = np.argsort(-lengths, kind="stable")
    rooms = _Rooms(capacity)
    of_length, counts = np.unique(-lengths, return_counts=True)
    row_of = [rows for length, count in zip(-of_length, counts, strict=True) for rows in rooms.place(length, count)]
    return Ragged.by_row(np.concatenate([np.zeros(0, np.int64), *row_of]), documents)


class _Rooms:
    """The rows that were begun, by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: dict[int, list[int]] = {}  # room left -> rows that have it, the last filled last
        self._rooms: list[int] = []  # the keys, sorted: at most `capacity` of them
        self._count = 0

    def place(self, length: int, count: int) -> list[NDArray[np.int64]]:
        """The rows of ``count`` documents of one length, in their order."""
        placed, length, count = [], int(length), int(count)
        while count:
            at = bisect_left(self._rooms, length)
            room = self._rooms[at] if at < len(self._rooms) else self._capacity
            in_each = room // length  # what is left is the least room that will do, until it will not
            rows = self._take(room, -(-count // in_each), new=at == len(self._rooms))
            given = np.repeat(np.array(rows, np.int64), in_each)[:count]
            count -= len(given)
            in_last = (len(given) - 1) % in_each + 1
            self._put(room - in_each * length, rows[:-1])
            self._put(room - in_last * length, rows[-1:])
            placed.append(given)
        return placed

    def _take(self, room: int, wanted: int, new: bool) -> list[int]:
        """Up to so many rows of that room, the last filled first, or new ones."""
        if new:
            self._count += wanted
            return list(range(self._count - wanted, self._count))
        rows = self._rows[room]
        taken = rows[-wanted:][::-1]
        del rows[-wanted:]
        if not rows:
            del self._rows[room]
            self._rooms.remove(room)
        return taken

    def _put(self, room: int, rows: list[int]) -> None:
        if not rows:
            return
        if room not in self._rows:
            self._rows[room] = []
            insort(self._rooms, room)
        self._rows[room] += rows
