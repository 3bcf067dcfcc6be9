"""The service as a user starts it, and clients for load."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
from pipelines import PATIENCE_S, REPOSITORY, title
from servers import Server


class Service(Server):
    """jobs/serve.py in its own session."""

    def __init__(self, folder: Path, port: int, *arguments: str):
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"serve-{port}.log"
        super().__init__(
            [sys.executable, str(REPOSITORY / "jobs" / "serve.py"), "--port", str(port), *arguments],
            self.log,
            {"PYTHONPATH": str(REPOSITORY)},
            f"{self.url}/health",
        )

    def processes(self, deployment: str) -> list[psutil.Process]:
        """Return the processes of the replicas of `ModelReplica` or `Ingress`."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if f":{deployment}" in title(process)]

    def end(self) -> int:
        """Send SIGTERM, wait until no process is left, and return the exit status."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_S)
        assert not psutil.wait_procs(family, timeout=60)[1], "the service left processes behind"
        self._log.close()
        return status


@dataclass(frozen=True)
class Reply:
    status: int
    """0: connection error."""
    seconds: float
    record: dict
    batch_size: int


async def send_request(session: aiohttp.ClientSession, url: str, image: bytes) -> Reply:
    start = time.perf_counter()
    try:
        async with session.post(url, data=image, headers={"Content-Type": "image/png"}) as response:
            record = await response.json() if response.content_type == "application/json" else {}
            batch_size = int(response.headers.get("X-Batch-Size", 0))
            return Reply(response.status, time.perf_counter() - start, record, batch_size)
    except aiohttp.ClientError:
        return Reply(0, time.perf_counter() - start, {}, 0)


def run_closed_loop(
    url: str, images: Sequence[bytes], clients: int, seconds: float, disturb: Callable[[], None] = lambda: None
) -> tuple[list[tuple[int, Reply]], float]:
    """Run clients that each send the next request after a response.

    Args:
        disturb: called in a thread after a third of the time.

    Returns:
        (image index, reply) of all requests, and the elapsed seconds.
    """

    async def run() -> tuple[list[tuple[int, Reply]], float]:
        replies: list[tuple[int, Reply]] = []
        start = time.perf_counter()

        async def client(number: int, session: aiohttp.ClientSession) -> None:
            index = number
            while time.perf_counter() - start < seconds:
                replies.append((index % len(images), await send_request(session, url, images[index % len(images)])))
                index += clients

        async def run_disturbance() -> None:
            await asyncio.sleep(seconds / 3)
            await asyncio.to_thread(disturb)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(run_disturbance(), *(client(number, session) for number in range(clients)))
        return replies, time.perf_counter() - start

    return asyncio.run(run())


def kill_under_load(process: psutil.Process) -> None:
    """Suspend the process before killing it, so that it has pending requests when it dies."""
    process.suspend()
    time.sleep(0.5)
    process.kill()
