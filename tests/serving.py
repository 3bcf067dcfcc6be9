"""The service as a user starts it, and clients for it."""

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
        """Of replicas of `ModelReplica` or `Ingress`."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if f":{deployment}" in title(process)]

    def end(self) -> int:
        """As an operator does; returns the exit status when no process is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_S)
        assert not psutil.wait_procs(family, timeout=60)[1], "the service left processes behind"
        self._log.close()
        return status


@dataclass(frozen=True)
class Reply:
    status: int
    """0: the connection broke."""
    seconds: float
    record: dict
    batch_size: int


async def ask(session: aiohttp.ClientSession, url: str, image: bytes) -> Reply:
    began = time.perf_counter()
    try:
        async with session.post(url, data=image, headers={"Content-Type": "image/png"}) as response:
            record = await response.json() if response.content_type == "application/json" else {}
            batch_size = int(response.headers.get("X-Batch-Size", 0))
            return Reply(response.status, time.perf_counter() - began, record, batch_size)
    except aiohttp.ClientError:
        return Reply(0, time.perf_counter() - began, {}, 0)


def closed_loop(
    url: str, images: Sequence[bytes], clients: int, seconds: float, meanwhile: Callable[[], None] = lambda: None
) -> tuple[list[tuple[int, Reply]], float]:
    """Clients that each ask again when they have their answer.

    Args:
        meanwhile: called in a thread after a third of the time.

    Returns:
        (number of the image, reply) of all requests, and the seconds that they took.
    """

    async def run() -> tuple[list[tuple[int, Reply]], float]:
        replies: list[tuple[int, Reply]] = []
        began = time.perf_counter()

        async def client(number: int, session: aiohttp.ClientSession) -> None:
            at = number
            while time.perf_counter() - began < seconds:
                replies.append((at % len(images), await ask(session, url, images[at % len(images)])))
                at += clients

        async def disturb() -> None:
            await asyncio.sleep(seconds / 3)
            await asyncio.to_thread(meanwhile)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(disturb(), *(client(number, session) for number in range(clients)))
        return replies, time.perf_counter() - began

    return asyncio.run(run())


def kill_at_work(process: psutil.Process) -> None:
    """Stopped first, so that it surely has requests when it dies."""
    process.suspend()
    time.sleep(0.5)
    process.kill()
