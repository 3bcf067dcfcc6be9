"""Threads that decode images for all clients, fairly and in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.data.images import MAX_PIXELS
from pipeline.serving.fair_queue import FairQueue

SMALL_COST = 4_000_000
"""Jobs up to this cost are small."""


@dataclass
class _Job:
    work: Callable[[], Any] | None
    """None: cancelled, or done."""
    cost: int
    result: asyncio.Future[Any]


class FairPool:
    """Thread pool of one event loop, with a fair queue each for small and for large jobs.

    One thread takes only small jobs, so that these never wait for a large one. Large jobs run together only while their
    costs sum to at most MAX_PIXELS. A cancelled job leaves the queue.

    Args:
        num_threads: number of threads; at least 2 are used.
    """

    def __init__(self, num_threads: int):
        self._num_threads = max(2, num_threads)
        self._executor = ThreadPoolExecutor(self._num_threads, "decode")
        self._small, self._large = FairQueue[_Job](), FairQueue[_Job]()
        self._num_running = 0
        self._running_large: list[int] = []

    async def run(self, client: str, cost: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`, which a thread computes.

        Args:
            cost: estimate of its time and memory, in pixels to decode.
        """
        job = _Job(partial(function, *arguments), max(1, cost), asyncio.get_running_loop().create_future())
        (self._large if cost > SMALL_COST else self._small).push(client, job.cost, job)
        self._start_jobs()
        try:
            return await job.result
        finally:
            job.work = None  # releases the image, also while the job is still in the queue

    def num_queued(self) -> int:
        return sum(job.work is not None for queue in (self._small, self._large) for job in queue)

    def _start_jobs(self) -> None:
        while self._num_running < self._num_threads:
            for queue in (self._small, self._large):
                while queue and queue.peek().work is None:
                    queue.pop()
            if self._large and self._has_room(self._large.peek().cost):
                job = self._large.pop()
                self._running_large.append(job.cost)
            elif self._small:
                job = self._small.pop()
            else:
                return
            assert job.work is not None
            self._num_running += 1
            running = asyncio.get_running_loop().run_in_executor(self._executor, job.work)
            running.add_done_callback(partial(self._finish, job))

    def _has_room(self, cost: int) -> bool:
        if len(self._running_large) >= self._num_threads - 1:
            return False
        return not self._running_large or sum(self._running_large) + cost <= MAX_PIXELS

    def _finish(self, job: _Job, running: asyncio.Future[Any]) -> None:
        self._num_running -= 1
        if job.cost > SMALL_COST:
            self._running_large.remove(job.cost)
        error = running.exception()
        if not job.result.done():  # else the caller gave up
            if error:
                job.result.set_exception(error)
            else:
                job.result.set_result(running.result())
        self._start_jobs()
