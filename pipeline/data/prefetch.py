"""Prefetching of items, such as images that threads decode while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar, cast

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], buffer_size: int) -> Generator[Item, None, None]:
    """Yield the items in order, each drawn from `items` `buffer_size` items before it is yielded, so that work which
    drawing it starts runs meanwhile."""
    drawn: deque[Item] = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) > buffer_size:
            yield drawn.popleft()
    while drawn:
        yield drawn.popleft()


def prefetch_in_thread(items: Iterable[Item], buffer_size: int) -> Generator[Item, None, None]:
    """Prefetch in a background thread, which ends with the generator. An error of `items` is raised after the items
    that precede it."""
    items, end = iter(items), cast(Item, object())
    thread = ThreadPoolExecutor(1, "read")
    try:
        for drawn in prefetch((thread.submit(next, items, end) for _ in repeat(None)), buffer_size):
            if (item := drawn.result()) is end:
                return
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
