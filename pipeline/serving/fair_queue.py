"""Start-time fair queuing (Goyal et al. 1996): clients with a backlog get equal shares of the work."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

MAX_CLIENTS = 1000
"""Number of remembered clients above which the half that has got the least work is forgotten."""


class FairQueue(Generic[Item]):
    """Queue that is ordered by how much work each client has got; a client without a backlog is next."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._order = itertools.count()
        self._virtual_time = 0.0
        self._finish_tags: dict[str, float] = {}

    def push(self, client: str, cost: float, item: Item) -> None:
        """Add an item; `cost` is its amount of work, in any unit."""
        start_tag = max(self._virtual_time, self._finish_tags.get(client, 0.0))
        self._finish_tags[client] = start_tag + cost
        heapq.heappush(self._heap, (start_tag, next(self._order), item))
        if len(self._finish_tags) > MAX_CLIENTS:
            tags = self._finish_tags.items()
            self._finish_tags = dict(heapq.nlargest(MAX_CLIENTS // 2, tags, key=lambda item: item[1]))

    def peek(self) -> Item:
        """Return the next item. Raises: IndexError: there is none."""
        return self._heap[0][2]

    def pop(self) -> Item:
        """Remove and return the next item. Raises: IndexError: there is none."""
        if not self._heap:
            raise IndexError("the queue is empty")
        self._virtual_time, _, item = heapq.heappop(self._heap)
        return item

    def __iter__(self) -> Iterator[Item]:
        """Yield the items, in no particular order."""
        return (item for _, _, item in self._heap)

    def __len__(self) -> int:
        return len(self._heap)
