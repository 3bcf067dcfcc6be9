"""The service as a user starts it, and clients for load."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from PIL import Image
from pipelines import PATIENCE_S, REPOSITORY, title
from servers import Server
from starlette.datastructures import Headers

from pipeline.data.preprocessing import Preprocessing
from pipeline.prediction.image_prediction import ImagePrediction
from pipeline.serving.admission import Limits
from pipeline.serving.http_api import Answer, HttpApi, ServedModel

TOKEN = "a token that nobody guesses".replace(" ", "-")
"""Sent with every request; a service without --token_file ignores it."""
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}


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
        async with session.post(url, data=image, headers={"Content-Type": "image/png", **AUTHORIZATION}) as response:
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


# The HTTP API in this process, without Ray

GROUP = {"ink": ["zero", "one", "two"], "neon": ["zero", "one", "two"]}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SERVED = {"digits": ServedModel("MmAP", "ViT", "0" * 64, GROUP, None, {}, False)}


def make_limits(**limits) -> Limits:
    values = {"max_request_bytes": 2000, "max_images": 3, "max_waiting": 2, "timeout_s": 5.0, "max_client_share": 1.0}
    return Limits(**{**values, **limits})


def api(
    predict=None, preprocessing: Preprocessing | None = None, ready: bool = True, tokens: Sequence[str] = (), **limits
) -> HttpApi:
    async def first_class(client: str, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        assert pixels.shape[1:] == (3, 32, 32) and pixels.dtype == np.uint8
        record = ImagePrediction(None, task, "zero", 1.0).to_dict()
        return Answer([record] * len(pixels), len(pixels))

    async def is_ready() -> bool:
        return ready

    preprocessing = preprocessing or Preprocessing(32)
    return HttpApi(SERVED, preprocessing, make_limits(**limits), predict or first_class, is_ready, tokens)


async def send(
    served: HttpApi,
    path: str = "/models/digits/predict",
    body: bytes | Sequence[bytes] = PNG,
    content_type: str | None = "image/png",
    query: bytes = b"",
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    client: str = "192.0.2.1",
    pause_s: float = 0,
):
    """Return (status, JSON or text, headers, number of body chunks that were read).

    Args:
        pause_s: before each chunk but the first.
    """
    chunks = [body] if isinstance(body, bytes) else list(body)
    remaining_chunks = iter(chunks)
    num_read = 0
    messages = []

    async def receive():
        nonlocal num_read
        if num_read:
            await asyncio.sleep(pause_s)
        num_read += 1
        return {"type": "http.request", "body": next(remaining_chunks), "more_body": num_read < len(chunks)}

    async def collect(message):
        messages.append(message)

    all_headers = [*headers, *([(b"content-type", content_type.encode("latin-1"))] if content_type else [])]
    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": all_headers}
    await served(scope | {"client": (client, 50000)}, receive, collect)
    start, *bodies = messages
    response_headers = Headers(raw=start["headers"])
    content = b"".join(message.get("body", b"") for message in bodies)
    is_json = response_headers["content-type"] == "application/json"
    return start["status"], json.loads(content) if is_json else content.decode(), response_headers, num_read


def get_response(served: HttpApi, *arguments, **options):
    return asyncio.run(send(served, *arguments, **options))


def json_request(**values) -> dict:
    return {"body": json.dumps(values).encode(), "content_type": "application/json; charset=utf-8"}


def blank_png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height)).save(stream, "PNG")
    return stream.getvalue()
