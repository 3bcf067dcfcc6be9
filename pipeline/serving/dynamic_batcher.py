"""Dynamic batching: while a batch runs, the next one fills.

Ray Serve's own `serve.batch` closes a batch after its wait timeout even while another one runs, so that many small
batches queue up under load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pipeline.serving.fair_queue import FairQueue

Call = TypeVar("Call")
Result = TypeVar("Result")


@dataclass
class _PendingCall(Generic[Call, Result]):
    call: Call
    size: int
    result: asyncio.Future[Result]
    arrival_time: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class DynamicBatcher(Generic[Call, Result]):
    """Batcher for the calls of one event loop, which takes turns between clients.

    Args:
        run: maps calls to their results, in order; runs one batch at a time.
        get_size: returns the size of a call.
        max_size: maximum size of a batch; a larger call is a batch by itself.
        wait_s: batch wait timeout.
    """

    def __init__(
        self,
        run: Callable[[list[Call]], Awaitable[list[Result]]],
        get_size: Callable[[Call], int],
        max_size: int,
        wait_s: float,
    ):
        self._run, self._get_size, self._max_size, self._wait_s = run, get_size, max_size, wait_s
        self._queue = FairQueue[_PendingCall[Call, Result]]()
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, client: str, call: Call) -> Result:
        """Return the result of a call. Raises: the exception of its batch."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        size = self._get_size(call)
        self._queue.push(client, size, _PendingCall(call, size, result))
        self._arrived.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._run_batches())
        return await result

    async def _run_batches(self) -> None:
        try:
            while self._queue:
                await self._wait_for_batch(min(pending.arrival_time for pending in self._queue) + self._wait_s)
                if batch := self._next_batch():
                    await self._run_batch(batch)
        finally:
            self._worker = None

    async def _wait_for_batch(self, deadline: float) -> None:
        while sum(pending.size for pending in self._queue) < self._max_size:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _next_batch(self) -> list[_PendingCall[Call, Result]]:
        batch: list[_PendingCall[Call, Result]] = []
        capacity = self._max_size
        while self._queue and (not batch or self._queue.peek().size <= capacity):
            pending = self._queue.pop()
            if not pending.result.cancelled():  # the caller gave up
                batch.append(pending)
                capacity -= pending.size
        return batch

    async def _run_batch(self, batch: list[_PendingCall[Call, Result]]) -> None:
        try:
            results = await self._run([pending.call for pending in batch])
        except Exception as error:  # raised in the callers
            for pending in batch:
                if not pending.result.done():
                    pending.result.set_exception(error)
        else:
            for pending, result in zip(batch, results, strict=True):
                if not pending.result.done():
                    pending.result.set_result(result)
