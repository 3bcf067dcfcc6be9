"""The HTTP API, as Starlette requests and responses, without Ray or torch.

Requests are rejected as early as possible: too many in flight before the body is read, a too large body before it is
read to the end. Every error response is JSON with `error`, which says what is wrong and what to do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from pipeline.config.suggestions import did_you_mean
from pipeline.data.images import BrokenImage, evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import escape_controls
from pipeline.prediction.encoded_images import decode_sent_image
from pipeline.prediction.image_prediction import ImagePrediction

BATCH_SIZE_HEADER = "X-Batch-Size"
"""Response header: size of the batch in which the model predicted these images."""
RETRY_AFTER_S = 1
_ENDPOINTS = "GET /health, GET /models, POST /models/<model>/predict"


@dataclass(frozen=True)
class ServedModel:
    """Description of a served model."""

    method: str
    clip: str
    weights: str
    """Fingerprint of the CLIP weights."""
    labels: dict[str, list[str]]
    """Task → labels of its classes."""
    threshold: float | None
    temperatures: dict[str, float]


@dataclass(frozen=True)
class Limits:
    max_request_bytes: int
    max_images: int
    """Images per request."""
    max_waiting: int
    """In-flight requests, from first byte to response."""
    timeout_s: float
    """Time for one request, from first byte to response."""
    decoding_threads: int


@dataclass(frozen=True)
class Answer:
    """Predictions for the images of a request, in order."""

    records: list[dict[str, Any]]
    """`ImagePrediction.to_dict()` of each image."""
    batch_size: int


class NoReplicaError(Exception):
    """No replica could answer."""


class HttpError(Exception):
    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, escape_controls(message), headers


class HttpApi:
    """
    Args:
        models: by their name in the URLs.
        preprocessing: preprocessing of images, the same for all models.
        predict: maps (model, task or None, uint8 pixels (B, 3, S, S)) to an Answer; raises NoReplicaError.
        ready: True if a replica can answer now.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        preprocessing: Preprocessing,
        limits: Limits,
        predict: Callable[[str, str | None, np.ndarray], Awaitable[Answer]],
        ready: Callable[[], Awaitable[bool]],
    ):
        self._models, self._preprocessing, self._limits = models, preprocessing, limits
        self._predict_pixels, self._ready = predict, ready
        self._decoding_threads = ThreadPoolExecutor(limits.decoding_threads, "decode")
        self._num_in_flight = 0

    async def __call__(self, request: Request) -> Response:
        try:
            match request.scope["path"].split("/")[1:]:
                case ["health"]:
                    _check_method(request, "GET", "HEAD")
                    return await self._health()
                case ["models"]:
                    _check_method(request, "GET", "HEAD")
                    return JSONResponse({"models": {name: self._describe_model(name) for name in self._models}})
                case ["models", name, "predict"]:
                    _check_method(request, "POST")
                    return await self._predict(request, name)
            raise HttpError(404, f"unknown path; the endpoints are {_ENDPOINTS}")
        except HttpError as error:
            return JSONResponse({"error": error.message}, error.status, error.headers)

    async def _health(self) -> Response:
        if await self._ready():
            return JSONResponse({"status": "ready"})
        raise HttpError(503, "no replica is ready", _retry_after())

    def _describe_model(self, name: str) -> dict[str, Any]:
        model = self._models[name]
        return {
            "method": model.method,
            "clip": model.clip,
            "weights": model.weights,
            "image_size": self._preprocessing.image_size,
            "tasks": model.labels,
            "threshold": model.threshold,
            "temperatures": model.temperatures,
        }

    async def _predict(self, request: Request, name: str) -> Response:
        if name not in self._models:
            raise HttpError(404, f"unknown model {name!r}; the models are {', '.join(self._models)}")
        if self._num_in_flight >= self._limits.max_waiting:
            raise HttpError(503, f"{self._num_in_flight} requests are in flight; retry later", _retry_after())
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._handle_predict(request, name)
        except TimeoutError:
            raise HttpError(
                504, f"timeout after {self._limits.timeout_s:g} s; send fewer images, or retry later"
            ) from None
        except NoReplicaError as error:
            raise HttpError(503, f"no replica could answer: {error}", _retry_after()) from None
        except ClientDisconnect:
            raise HttpError(400, "the client disconnected before the request was complete") from None
        finally:
            self._num_in_flight -= 1

    async def _handle_predict(self, request: Request, name: str) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = content_type == "application/json"
        if not (is_json or content_type.startswith("image/") or content_type == "application/octet-stream"):
            message = (
                f"unsupported Content-Type {content_type!r}; send an image as image/*, or several as application/json"
            )
            raise HttpError(415, message, {"Accept-Post": "image/*, application/json"})
        task = self._query_task(request)
        body = await self._read_body(request)
        if is_json:
            images, task = await self._run_in_thread(self._parse_json, body, task)
        else:
            images = [body]
        named_task = self._check_task(name, task)
        decoded = await asyncio.gather(*(self._run_in_thread(self._decode, image) for image in images))
        pixels = [image for image in decoded if not isinstance(image, str)]
        answer = await self._predict_pixels(name, task, np.stack(pixels)) if pixels else Answer([], 0)
        predicted = iter(answer.records)
        records = [
            ImagePrediction(task=named_task, error=image).to_dict() if isinstance(image, str) else next(predicted)
            for image in decoded
        ]
        headers = {BATCH_SIZE_HEADER: str(answer.batch_size)}
        if is_json:
            return JSONResponse({"predictions": records}, headers=headers)
        return JSONResponse(records[0], 422 if records[0]["error"] else 200, headers)

    def _query_task(self, request: Request) -> str | None:
        parameters = request.query_params.multi_items()
        if unknown := [name for name, _ in parameters if name != "task"]:
            raise HttpError(422, f"unknown query parameter {unknown[0]!r}; the only one is task")
        if len(parameters) > 1:
            raise HttpError(422, "task is given more than once; give one, or none for all tasks")
        return parameters[0][1] if parameters else None

    async def _read_body(self, request: Request) -> bytes:
        limit = self._limits.max_request_bytes
        too_large = HttpError(413, f"the request body exceeds {limit:,} bytes; send fewer or smaller images")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _parse_json(self, body: bytes, task: str | None) -> tuple[list[Any], str | None]:
        """Return the images as they were sent, and the task."""
        try:
            values = json.loads(body, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"the body is not valid JSON: {error}") from None
        schema = '{"images": ["<base64>", ...], "task": "<task>"}'
        if not isinstance(values, dict):
            raise HttpError(422, f"invalid JSON body; expected {schema}, task optional")
        if unknown := [key for key in values if key not in ("images", "task")]:
            hint = did_you_mean(unknown[0], ("images", "task"))
            raise HttpError(422, f"unknown key {unknown[0]!r}{hint} Expected {schema}, task optional")
        images, body_task = values.get("images"), values.get("task")
        if not isinstance(images, list) or not images:
            raise HttpError(422, f"images must be a list of base64 strings, and not empty; expected {schema}")
        if len(images) > self._limits.max_images:
            raise HttpError(
                413, f"{len(images):,} images exceed the limit of {self._limits.max_images:,}; send several requests"
            )
        if not (body_task is None or isinstance(body_task, str)):
            raise HttpError(422, f"task must be a string; expected {schema}")
        if body_task is not None and task is not None and body_task != task:
            raise HttpError(422, f"task is {body_task!r} in the body but {task!r} in the query; give one")
        return images, task if body_task is None else body_task

    def _check_task(self, name: str, task: str | None) -> str | None:
        """Return the task, or the only one of the model."""
        tasks = self._models[name].labels
        if task is not None and task not in tasks:
            raise HttpError(422, f"unknown task {task!r}; model {name!r} has the tasks {', '.join(tasks)}")
        return task or (next(iter(tasks)) if len(tasks) == 1 else None)

    def _decode(self, image: object) -> np.ndarray | str:
        """Return the pixels (3, S, S), or the error of a broken image."""
        try:
            if not (data := decode_sent_image(image)):
                raise BrokenImage("no bytes")
            return evaluation_pixels(data, self._preprocessing)
        except BrokenImage as error:
            return escape_controls(str(error)) or type(error).__name__
        except MemoryError:
            raise HttpError(503, "out of memory while decoding the image; retry later", _retry_after()) from None

    async def _run_in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._decoding_threads, function, *arguments)


def _check_method(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise HttpError(
            405, f"method {request.method} not allowed; the endpoints are {_ENDPOINTS}", {"Allow": ", ".join(methods)}
        )


def _retry_after() -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_S)}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has the same key twice")
    return values
