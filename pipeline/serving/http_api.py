"""What the service answers over HTTP, as Starlette requests and responses; it knows neither Ray nor torch.

A request is refused as early as possible: too many at once before its body is read, too large a body before it is read
to its end. Every refusal is JSON with `error`, which says what to do instead.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from pipeline.data.images import BrokenImage, evaluation_pixels
from pipeline.errors import escape_controls

BATCH_SIZE_HEADER = "X-Batch-Size"
"""Header of an answer: how many images the model took together with this request's, these included."""
RETRY_AFTER_S = 1
_PATHS = "GET /health, GET /models, POST /models/<model>/predict"


@dataclass(frozen=True)
class ServedModel:
    """What is told of a model."""

    method: str
    clip: str
    weights: str
    """Fingerprint of the CLIP."""
    labels: dict[str, list[str]]
    """Task → what its classes are called."""
    threshold: float | None
    temperatures: dict[str, float]


@dataclass(frozen=True)
class Limits:
    max_request_bytes: int
    max_images: int
    """Of one request."""
    max_waiting: int
    """Requests that are held at once, from their first byte to their answer."""
    timeout_s: float
    """For one request, from its first byte to its answer."""
    decoding_threads: int


@dataclass(frozen=True)
class Answer:
    """Of some images, in order."""

    records: list[dict[str, Any]]
    """`ImagePrediction.record` of each."""
    batch_size: int


class NoReplica(Exception):
    """No replica could answer."""


class Refused(Exception):
    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status, self.error, self.headers = status, escape_controls(error), headers


class HttpApi:
    """
    Args:
        models: by the name that the paths have.
        image_size: side of the pixels that the models take.
        predict: (model, task or None, uint8 pixels (B, 3, S, S)) → their answer; raises NoReplica.
        ready: whether a replica can answer now.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        image_size: int,
        limits: Limits,
        predict: Callable[[str, str | None, np.ndarray], Awaitable[Answer]],
        ready: Callable[[], Awaitable[bool]],
    ):
        self._models, self._image_size, self._limits = models, image_size, limits
        self._ask, self._ready = predict, ready
        self._decoding = ThreadPoolExecutor(limits.decoding_threads, "decode")
        self._held = 0

    async def __call__(self, request: Request) -> Response:
        try:
            match request.scope["path"].split("/")[1:]:
                case ["health"]:
                    _allow(request, "GET", "HEAD")
                    return await self._health()
                case ["models"]:
                    _allow(request, "GET", "HEAD")
                    return JSONResponse({"models": {name: self._described(name) for name in self._models}})
                case ["models", name, "predict"]:
                    _allow(request, "POST")
                    return await self._predict(request, name)
            raise Refused(404, f"no such path; there are {_PATHS}")
        except Refused as refused:
            return JSONResponse({"error": refused.error}, refused.status, refused.headers)

    async def _health(self) -> Response:
        if await self._ready():
            return JSONResponse({"status": "ready"})
        raise Refused(503, "no replica holds the models now", _retry_after())

    def _described(self, name: str) -> dict[str, Any]:
        model = self._models[name]
        return {
            "method": model.method,
            "clip": model.clip,
            "weights": model.weights,
            "image_size": self._image_size,
            "tasks": model.labels,
            "threshold": model.threshold,
            "temperatures": model.temperatures,
        }

    async def _predict(self, request: Request, name: str) -> Response:
        if name not in self._models:
            raise Refused(404, f"no model {name!r}; there are {', '.join(self._models)}")
        if self._held >= self._limits.max_waiting:
            raise Refused(503, f"{self._held} requests are waiting already: try again later", _retry_after())
        self._held += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._predict_in_time(request, name)
        except TimeoutError:
            raise Refused(504, f"no answer within {self._limits.timeout_s:g} s: send less, or try later") from None
        except NoReplica as error:
            raise Refused(503, f"no replica could answer: {error}", _retry_after()) from None
        except ClientDisconnect:
            raise Refused(400, "the client went away before its request was whole") from None
        finally:
            self._held -= 1

    async def _predict_in_time(self, request: Request, name: str) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = kind == "application/json"
        if not (is_json or kind.startswith("image/") or kind == "application/octet-stream"):
            raise Refused(
                415, f"Content-Type {kind!r}: send an image as image/*, or several as application/json", _accepted()
            )
        task = self._task_of_query(request)
        body = await self._body(request)
        if is_json:
            images, task = await self._in_thread(self._read_json, body, task)
        else:
            images = [body]
        self._check_task(name, task)
        decoded = await asyncio.gather(*(self._in_thread(self._decode, image) for image in images))
        pixels = [image for image in decoded if not isinstance(image, str)]
        answer = await self._ask(name, task, np.stack(pixels)) if pixels else Answer([], 0)
        in_order = iter(answer.records)
        records = [_broken(task, image) if isinstance(image, str) else next(in_order) for image in decoded]
        headers = {BATCH_SIZE_HEADER: str(answer.batch_size)}
        if is_json:
            return JSONResponse({"predictions": records}, headers=headers)
        return JSONResponse(records[0], 422 if records[0]["error"] else 200, headers)

    def _task_of_query(self, request: Request) -> str | None:
        found = request.query_params.multi_items()
        if unknown := [name for name, _ in found if name != "task"]:
            raise Refused(422, f"query parameter {unknown[0]!r}: there is task only")
        if len(found) > 1:
            raise Refused(422, "several tasks: give one, or none for all tasks")
        return found[0][1] or None if found else None

    async def _body(self, request: Request) -> bytes:
        most = self._limits.max_request_bytes
        too_large = Refused(413, f"the request's body is more than {most:,} bytes: send fewer or smaller images")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)

    def _read_json(self, body: bytes, task: str | None) -> tuple[list[bytes | str], str | None]:
        """The images, or for those that are no base64, what is wrong; and the task."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from None
        form = '{"images": ["<base64>", ...], "task": "<task>"}'
        if not isinstance(values, dict) or not values.keys() <= {"images", "task"}:
            raise Refused(422, f"the body must be {form}, with task or without")
        images, own_task = values.get("images"), values.get("task")
        if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
            raise Refused(422, f"images must be a list of base64 texts: {form}")
        if len(images) > self._limits.max_images:
            raise Refused(
                413, f"{len(images):,} images are more than {self._limits.max_images:,}: send several requests"
            )
        if not (own_task is None or isinstance(own_task, str)):
            raise Refused(422, f"task must be a text: {form}")
        if own_task and task and own_task != task:
            raise Refused(422, f"task {own_task!r} in the body, {task!r} in the query: give one")
        return [_from_base64(image) for image in images], own_task or task

    def _check_task(self, name: str, task: str | None) -> None:
        tasks = self._models[name].labels
        if task is not None and task not in tasks:
            raise Refused(422, f"task {task!r} is none of model {name!r}: {', '.join(tasks)}")

    def _decode(self, image: bytes | str) -> np.ndarray | str:
        """Pixels (3, S, S), or what is wrong with the image."""
        if isinstance(image, str):
            return image
        try:
            if not image:
                raise BrokenImage("no bytes")
            return evaluation_pixels(image, self._image_size)
        except BrokenImage as error:
            return escape_controls(str(error)) or type(error).__name__
        except MemoryError:
            raise Refused(503, "no memory to decode the image now", _retry_after()) from None

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._decoding, work, *arguments)


def _allow(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise Refused(405, f"{request.method} is not possible here; there are {_PATHS}", {"Allow": ", ".join(methods)})


def _retry_after() -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_S)}


def _accepted() -> dict[str, str]:
    return {"Accept-Post": "image/*, application/json"}


def _from_base64(text: str) -> bytes | str:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        return f"no base64: {escape_controls(str(error))}"


def _broken(task: str | None, error: str) -> dict[str, Any]:
    """As `ImagePrediction.record` of a broken image."""
    return {
        "task": task,
        "label": None,
        "probability": None,
        "probabilities": {},
        "error": error,
        "by_task": [],
    }
