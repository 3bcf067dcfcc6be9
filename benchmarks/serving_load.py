#!/usr/bin/env python
"""Load test of mmap-clip serve with clients on one machine: requests per second, latencies, batch sizes, and requests
lost when a replica is killed; compared with direct calls of the model, and with the service without batching. `attacks`
measures what two attacks from another address leave to four ordinary clients.

    python benchmarks/serving_load.py                              the demo's tiny CLIP, 2 replicas of 1 CPU core
    python benchmarks/serving_load.py --clip ViT-B-32 --replicas 1 --cpus-per-replica 2 --side 500
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import torch
from common import table, write_results
from PIL import Image
from prediction_speed import jpegs, make_adapter_file
from servers import free_ports
from serving import Reply, Service, kill_under_load, run_closed_loop, send_request

from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, MmapConfig
from pipeline.prediction.load import load_model

TASKS = ("ink", "neon")
CLASSES = [f"class {number}" for number in range(10)]
WARM_UP_S = 3
ATTACK_S = 6
"""An attack begins after this time and takes three times as long."""
ATTACKER = "127.0.0.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default=BUILTIN_DIGITS, help="open_clip model name, with random weights")
    parser.add_argument("--side", type=int, default=64, help="width of the JPEGs in pixels")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus-per-replica", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8, help="duration of each load")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument(
        "--parts", nargs="+", default=["direct", "batches", "no-batches", "kill"], help="what to measure"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="serving-load-"))
    pretrained = BUILTIN_DIGITS if arguments.clip == BUILTIN_DIGITS else None
    config = Config(
        clip=ClipConfig(model=arguments.clip, pretrained=pretrained), mmap=MmapConfig(prompt_length=8, source_rows=8)
    )
    file = make_adapter_file(config, dict.fromkeys(TASKS, CLASSES))
    images = jpegs(64, arguments.side)
    rows: list[tuple[str, ...]] = []

    def serve(*extra_arguments: str) -> Service:
        (port,) = free_ports(1, start=8600)
        cpus = ["--cluster.cpus_per_worker", str(arguments.cpus_per_replica)]
        replicas = ["--replicas", str(arguments.replicas), *cpus]
        service = Service(folder, port, "--models", f"m={file}", *replicas, *extra_arguments)
        run_closed_loop(predict_url(service), images, 4, WARM_UP_S)
        return service

    def add_row(*row_cells: str) -> None:
        rows.append(row_cells)
        print(" | ".join(row_cells), flush=True)

    if "direct" in arguments.parts:
        torch.set_num_threads(arguments.cpus_per_replica)
        rate, batch_seconds = measure_direct(file, images, arguments.seconds)
        add_row("`predict` itself, batches of 64", f"{rate:.0f}", f"{batch_seconds * 1e3:.0f}", "", "", "64", "")
    if "batches" in arguments.parts:
        service = serve()
        try:
            for clients in arguments.clients:
                add_row(*make_row(client_count_label(clients), *run_load(service, images, clients, arguments.seconds)))
            half = max(float(row_cells[1]) for row_cells in rows[-len(arguments.clients) :]) / 2
            results = run_open_loop(predict_url(service), images, half, arguments.seconds)
            add_row(*make_row(f"constant {half:.0f} requests/s", *results))
            rate = measure_multi_image_requests(service, images[:32], arguments.seconds)
            add_row("images, 32 per request (JSON), 4 clients", f"{rate:.0f}", "", "", "", "", "0")
        finally:
            service.end()
    if "no-batches" in arguments.parts:
        service = serve("--max_batch", "1")
        try:
            for clients in (arguments.clients[0], arguments.clients[-1]):
                results = run_load(service, images, clients, arguments.seconds)
                add_row(*make_row(f"{client_count_label(clients)}, `--max_batch 1`", *results))
        finally:
            service.end()
    if "kill" in arguments.parts:
        for deployment in ("ModelReplica", "Ingress"):
            service = serve()

            def kill_one(service: Service = service, deployment: str = deployment) -> None:
                kill_under_load(service.processes(deployment)[0])

            try:
                results = run_load(service, images, 32, 2 * arguments.seconds, kill_one)
                add_row(*make_row(f"32 clients, {deployment} killed", *results))
            finally:
                service.end()

    if "attacks" in arguments.parts:
        print(table(["attack", "before", "during", "after", "longest wait, s", "ingress, MiB"], measure_attacks(serve)))
    if not rows:
        return

    columns = ["", "per second", "p50, ms", "p90, ms", "p99, ms", "images per batch", "lost"]
    print(f"\n{arguments.clip}, {arguments.replicas} x {arguments.cpus_per_replica} CPU, torch {torch.__version__}\n")
    print(table(columns, rows))
    values = {name: getattr(arguments, name) for name in ("clip", "side", "replicas", "cpus_per_replica", "seconds")}
    name = "digits" if arguments.clip == BUILTIN_DIGITS else arguments.clip
    write_results(f"serving_load_{name}", torch.device("cpu"), {**values, "columns": columns, "rows": rows})


def measure_attacks(serve: Callable[[], Service]) -> list[tuple[str, ...]]:
    """Return a row for each attack: requests per second of the ordinary clients before, during and after it, their
    longest wait, and the ingress's memory before and at most."""
    rows = []
    for name, attack in {"slow bodies": send_slow_bodies, "large images": send_large_images}.items():
        service = serve()
        try:
            rows.append((name, *measure_attack(service, attack)))
        finally:
            service.end()
    return rows


def measure_attack(service: Service, attack: Callable[[Service], Coroutine[Any, Any, None]]) -> tuple[str, ...]:
    replies: list[tuple[float, Reply]] = []
    images = jpegs(64, 64)
    (ingress,) = service.processes("Ingress")
    memory = [ingress.memory_info().rss]
    start, stop = ATTACK_S, 4 * ATTACK_S
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() - began < stop + ATTACK_S:
            reply = await send_request(session, predict_url(service), images[len(replies) % len(images)])
            replies.append((time.perf_counter() - began, reply))
            await asyncio.sleep(0 if reply.status == 200 else 0.1)

    async def watch_memory() -> None:
        while time.perf_counter() - began < stop + ATTACK_S:
            memory.append(ingress.memory_info().rss)
            await asyncio.sleep(0.1)

    async def run_attack() -> None:
        await asyncio.sleep(start)
        with suppress(TimeoutError):
            async with asyncio.timeout(stop - start):
                await attack(service)

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(run_attack(), watch_memory(), *(client(session) for _ in range(4)))

    asyncio.run(run())
    good = [end for end, reply in replies if reply.status == 200]
    rates = [
        sum(low <= end < high for end in good) / (high - low)
        for low, high in ((0, start), (start, stop), (stop, stop + ATTACK_S))
    ]
    longest = max(reply.seconds for _, reply in replies)
    cells = [f"{rate:.0f}" for rate in rates] + [f"{longest:.1f}"]
    return *cells, f"{memory[0] / 2**20:.0f} → {max(memory) / 2**20:.0f}"


async def send_slow_bodies(service: Service) -> None:
    """256 connections, each of which sends one byte of a body, and connects again when it is closed."""
    host, port = service.url.removeprefix("http://").split(":")
    head = (
        f"POST /models/m/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nx"
    )

    async def connect() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port), local_addr=(ATTACKER, 0))
                try:
                    writer.write(head.encode())
                    await reader.read(2**16)
                finally:
                    writer.close()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(connect() for _ in range(256)))


async def send_large_images(service: Service) -> None:
    """One request after another, each a JSON of 64 PNGs of 88 megapixels, 8 MiB in all."""
    stream = io.BytesIO()
    Image.new("L", (9380, 9380)).save(stream, "PNG")
    body = json.dumps({"images": [base64.b64encode(stream.getvalue()).decode()] * 64, "task": "ink"}).encode()
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(ATTACKER, 0))) as session:
        while True:
            with suppress(aiohttp.ClientError):
                async with session.post(f"{service.url}/models/m/predict", data=body, headers=headers) as response:
                    await response.read()
            await asyncio.sleep(0.1)


def client_count_label(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def predict_url(service: Service) -> str:
    return f"{service.url}/models/m/predict?task=ink"


def run_load(
    service: Service,
    images: Sequence[bytes],
    clients: int,
    seconds: float,
    disturb: Callable[[], None] = lambda: None,
) -> tuple[list[Reply], float]:
    replies, elapsed = run_closed_loop(predict_url(service), images, clients, seconds, disturb)
    return [reply for _, reply in replies], elapsed


def run_open_loop(url: str, images: Sequence[bytes], rate: float, seconds: float) -> tuple[list[Reply], float]:
    """Send requests at a constant rate, regardless of responses; latencies count from when a request was due."""

    async def run() -> list[Reply]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            began = time.perf_counter()

            async def send(number: int) -> Reply:
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                late = time.perf_counter() - (began + number / rate)
                reply = await send_request(session, url, images[number % len(images)])
                return Reply(reply.status, late + reply.seconds, reply.record, reply.batch_size)

            return await asyncio.gather(*(send(number) for number in range(int(rate * seconds))))

    began = time.perf_counter()
    return asyncio.run(run()), time.perf_counter() - began


def measure_multi_image_requests(service: Service, images: Sequence[bytes], seconds: float) -> float:
    """Return the images per second of clients that send several images per request."""
    body = {"images": [base64.b64encode(image).decode() for image in images], "task": "ink"}

    async def run() -> float:
        count, began = 0, time.perf_counter()

        async def client(session: aiohttp.ClientSession) -> None:
            nonlocal count
            while time.perf_counter() - began < seconds:
                async with session.post(f"{service.url}/models/m/predict", json=body) as response:
                    response.raise_for_status()
                    count += len((await response.json())["predictions"])

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(client(session) for _ in range(4)))
        return count / (time.perf_counter() - began)

    return asyncio.run(run())


def measure_direct(file: Path, images: Sequence[bytes], seconds: float) -> tuple[float, float]:
    """Return images per second and seconds per batch of the same model in this process, with a replica's threads."""
    model = load_model(file)
    model.predict(images, "ink")
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        model.predict(images, "ink")
        count += 1
    elapsed = time.perf_counter() - began
    return count * len(images) / elapsed, elapsed / count


def make_row(label: str, replies: Sequence[Reply], seconds: float) -> tuple[str, ...]:
    good = [reply for reply in replies if reply.status == 200]
    latencies = sorted(reply.seconds * 1e3 for reply in good)
    p50, p90, p99 = (f"{latencies[int(share * len(latencies))]:.0f}" for share in (0.5, 0.9, 0.99))
    batches = sum(1 / reply.batch_size for reply in good)
    lost = str(len(replies) - len(good))
    return label, f"{len(good) / seconds:.0f}", p50, p90, p99, f"{len(good) / batches:.1f}", lost


if __name__ == "__main__":
    main()
