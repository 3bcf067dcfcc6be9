"""Admission of requests: how many are in flight, how many bytes they hold, and how fast a body must arrive."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.serving.errors import HttpError, retry_after

MIN_UPLOAD_RATE = 32 * 2**10
"""Bytes per second that a body must arrive with, on average, after `Limits.upload_timeout_s`."""


@dataclass(frozen=True)
class Limits:
    """Limits of an ingress."""

    max_request_bytes: int = 10 * 2**20
    max_images: int = 64
    """Images per request."""
    max_pixels: int = 256_000_000
    """Pixels of all images of a request."""
    max_waiting: int = 256
    """Requests whose body has arrived; and requests whose body is arriving."""
    max_buffered_bytes: int = 2**30
    """Bytes of the bodies and pixels of all requests."""
    max_client_share: float = 0.5
    """Share of the two above that one client may use."""
    upload_timeout_s: float = 10
    """Time for the body of a request, plus a second for each MIN_UPLOAD_RATE bytes."""
    timeout_s: float = 60
    """Time for one request, from first byte to response."""
    decoding_threads: int = 2


@dataclass(eq=False)
class Slot:
    """A request in flight."""

    client: str
    num_bytes: int = 0
    is_arriving: bool = True
    arrival: asyncio.Timeout | None = None
    """Deadline of the next bytes of the body."""
    is_shed: bool = False


class Admission:
    """Requests in flight. While bodies arrive, those of the client with the most of them are shed first; a request
    counts as waiting only once its body has arrived. So slow clients do not keep others out."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._slots: dict[Slot, None] = {}  # oldest first
        self._num_bytes: Counter[str] = Counter()  # by client

    def num_arriving(self) -> int:
        return sum(slot.is_arriving for slot in self._slots)

    def num_waiting(self) -> int:
        return len(self._slots) - self.num_arriving()

    @contextmanager
    def admit(self, client: str) -> Iterator[Slot]:
        """Hold a slot while the block runs. Raises: HttpError: too many requests, of all or of this client."""
        self._check_waiting()
        limit = max(1, int(self._limits.max_waiting * self._limits.max_client_share))
        if sum(slot.client == client for slot in self._slots) >= limit:
            message = f"{limit} requests of this client are in flight; wait for responses, or send several images each"
            raise HttpError(429, message, retry_after(), "client limit")
        if self.num_arriving() >= self._limits.max_waiting:
            self._shed()
        slot = Slot(client)
        self._slots[slot] = None
        try:
            yield slot
        finally:
            del self._slots[slot]
            self.hold(slot, 0)

    async def read_body(self, slot: Slot, chunks: AsyncIterator[bytes]) -> bytes:
        """Read a body, and count the request as waiting.

        Raises:
            HttpError: the body is too large or too slow, or too many requests are in flight.
        """
        clock, body = asyncio.get_running_loop().time, bytearray()
        deadline = clock() + (0 if slot.is_shed else self._limits.upload_timeout_s)
        try:
            async with (arrival := asyncio.timeout_at(deadline)):
                slot.arrival = arrival
                async for chunk in chunks:
                    body += chunk
                    if len(body) > self._limits.max_request_bytes:
                        raise self.too_large(close=True)
                    self.hold(slot, len(body))
                    if not slot.is_shed:
                        arrival.reschedule(deadline + len(body) / MIN_UPLOAD_RATE)
        except TimeoutError:
            if not arrival.expired():  # a timeout of the caller's
                raise
            if slot.is_shed:
                message = "too many requests are arriving, and this was the oldest of their sender; retry later"
                raise HttpError(503, message, retry_after() | _CLOSE, "shed") from None
            rate = MIN_UPLOAD_RATE // 2**10
            raise HttpError(
                408,
                f"the request body did not arrive within {self._limits.upload_timeout_s:g} s, plus a second for each "
                f"{rate} KiB; send it faster, or in smaller requests",
                _CLOSE,
                "slow body",
            ) from None
        self._check_waiting()
        slot.is_arriving = False
        return bytes(body)

    def too_large(self, close: bool = False) -> HttpError:
        message = f"the request body exceeds {self._limits.max_request_bytes:,} bytes; send fewer or smaller images"
        return HttpError(413, message, _CLOSE if close else {}, "body size")

    def hold(self, slot: Slot, num_bytes: int) -> None:
        """Set the number of bytes that a request holds in memory.

        Raises:
            HttpError: it is more than before, and too much with those of the other requests.
        """
        grows = num_bytes > slot.num_bytes
        self._num_bytes[slot.client] += num_bytes - slot.num_bytes
        slot.num_bytes = num_bytes
        if not self._num_bytes[slot.client]:
            del self._num_bytes[slot.client]
        if not grows:
            return
        limits = self._limits
        share = max(limits.max_request_bytes, int(limits.max_buffered_bytes * limits.max_client_share))
        if self._num_bytes[slot.client] > share:
            message = f"requests of this client hold more than {share:,} bytes; wait for responses"
            raise HttpError(429, message, retry_after(), "client limit")
        if self._num_bytes.total() > limits.max_buffered_bytes:
            raise HttpError(503, "the requests in flight fill the memory; retry later", retry_after(), "memory")

    def _check_waiting(self) -> None:
        if (num_waiting := self.num_waiting()) >= self._limits.max_waiting:
            raise HttpError(503, f"{num_waiting} requests are in flight; retry later", retry_after(), "waiting")

    def _shed(self) -> None:
        """End the oldest arriving body of the client that has the most."""
        arriving = [slot for slot in self._slots if slot.is_arriving and not slot.is_shed]
        if not arriving:
            return
        ((client, _),) = Counter(slot.client for slot in arriving).most_common(1)
        victim = next(slot for slot in arriving if slot.client == client)
        victim.is_shed = True
        if victim.arrival is not None and not victim.arrival.expired():
            victim.arrival.reschedule(asyncio.get_running_loop().time())


_CLOSE = {"Connection": "close"}
