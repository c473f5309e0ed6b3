"""The next item is made while the present one is worked on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_END = object()


def one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """``items``, each taken in a thread of its own before it is asked for; what taking it raises comes in its place."""
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as thread:
        following = thread.submit(next, items, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, items, _END)
            yield item  # type: ignore[misc]  # it is no _END
