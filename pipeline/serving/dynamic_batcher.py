"""Runs what is asked for in batches: while one runs, the next one fills.

Ray Serve's own `serve.batch` closes a batch after its wait also while another one runs, so that under load many small
ones queue up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Call, Result]):
    call: Call
    size: int
    result: asyncio.Future[Result]
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class DynamicBatcher(Generic[Call, Result]):
    """Of one event loop.

    Args:
        run: some calls → their results, in order; runs once at a time.
        size_of: of a call.
        max_size: of a batch; a larger call is one by itself.
        wait_s: how long a call waits for others to fill the batch.
    """

    def __init__(
        self,
        run: Callable[[list[Call]], Awaitable[list[Result]]],
        size_of: Callable[[Call], int],
        max_size: int,
        wait_s: float,
    ):
        self._run, self._size_of, self._max_size, self._wait_s = run, size_of, max_size, wait_s
        self._waiting: deque[_Waiting[Call, Result]] = deque()
        self._came = asyncio.Event()
        self._at_work: asyncio.Task[None] | None = None

    async def ask(self, call: Call) -> Result:
        """Raises: what the batch raised that the call was in."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(call, self._size_of(call), result))
        self._came.set()
        if self._at_work is None:
            self._at_work = asyncio.create_task(self._work())
        return await result

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._fill(self._waiting[0].since + self._wait_s)
                if batch := self._next_batch():
                    await self._answer(batch)
        finally:
            self._at_work = None

    async def _fill(self, until: float) -> None:
        while sum(one.size for one in self._waiting) < self._max_size:
            self._came.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._came.wait()
            except TimeoutError:
                return

    def _next_batch(self) -> list[_Waiting[Call, Result]]:
        batch: list[_Waiting[Call, Result]] = []
        room = self._max_size
        while self._waiting and (not batch or self._waiting[0].size <= room):
            one = self._waiting.popleft()
            if not one.result.cancelled():  # whoever asked has gone
                batch.append(one)
                room -= one.size
        return batch

    async def _answer(self, batch: list[_Waiting[Call, Result]]) -> None:
        try:
            results = await self._run([one.call for one in batch])
        except Exception as error:  # it belongs to those who asked
            for one in batch:
                if not one.result.done():
                    one.result.set_exception(error)
        else:
            for one, result in zip(batch, results, strict=True):
                if not one.result.done():
                    one.result.set_result(result)
