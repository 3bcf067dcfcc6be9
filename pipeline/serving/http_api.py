"""The HTTP API as an ASGI application, without Ray or torch.

Requests are rejected as early as possible: those without a token, with a wrong header or too many before the body is
read, a too large body before it is read to the end, too many pixels before any is decoded. Every error response is JSON
with `error`, which says what is wrong and what to do.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pipeline.config.suggestions import did_you_mean
from pipeline.data.images import BrokenImage, evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import escape_controls
from pipeline.prediction.encoded_images import decode_sent_image, num_pixels_to_decode
from pipeline.prediction.image_prediction import ImagePrediction
from pipeline.serving.admission import Admission, Limits, Slot
from pipeline.serving.errors import HttpError, retry_after
from pipeline.serving.fair_pool import FairPool
from pipeline.serving.metrics import CONTENT_TYPE, ServiceMetrics
from pipeline.serving.openapi import openapi
from pipeline.serving.tokens import find_token

BATCH_SIZE_HEADER = "X-Batch-Size"
"""Response header: size of the batch in which the model predicted these images."""
MAX_QUOTED = 80
"""Characters of a name that an error quotes."""
_ENDPOINTS = {
    "/health": ("GET", "HEAD"),
    "/models": ("GET", "HEAD"),
    "/models/<model>/predict": ("POST",),
    "/metrics": ("GET", "HEAD"),
    "/openapi.json": ("GET", "HEAD"),
}
"""Path → methods."""
_LOGGER = logging.getLogger("ray.serve")


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
    multi_label: bool
    """Whether an image may have several labels."""


@dataclass(frozen=True)
class Answer:
    """Predictions for the images of a request, in order."""

    records: list[dict[str, Any]]
    """`ImagePrediction.to_dict()` of each image."""
    batch_size: int


class NoReplicaError(Exception):
    """No replica could answer."""


class HttpApi:
    """
    Args:
        models: by their name in the URLs.
        preprocessing: preprocessing of images, the same for all models.
        predict: maps (client, model, task or None, uint8 pixels (B, 3, S, S)) to an Answer; raises NoReplicaError.
        ready: True if a replica can answer now.
        token_digests: SHA-256 of the tokens, one of which a request must have; empty: no token is needed.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        preprocessing: Preprocessing,
        limits: Limits,
        predict: Callable[[str, str, str | None, np.ndarray], Awaitable[Answer]],
        ready: Callable[[], Awaitable[bool]],
        token_digests: Sequence[str] = (),
    ):
        self._models, self._preprocessing, self._limits = models, preprocessing, limits
        self._predict_pixels, self._ready, self._token_digests = predict, ready, token_digests
        self._pool = FairPool(limits.decoding_threads)
        self._admission = Admission(limits)
        self._metrics = ServiceMetrics(
            {
                ("mmap_clip_arriving_requests", "Requests whose body is arriving."): self._admission.num_arriving,
                ("mmap_clip_waiting_requests", "Requests that wait for a response."): self._admission.num_waiting,
                ("mmap_clip_decoding_queue", "Images that wait to be decoded."): self._pool.num_queued,
            }
        )
        self._openapi = openapi(models, limits, bool(token_digests))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await (await self._respond(Request(scope, receive)))(scope, receive, send)
            case "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "no WebSockets"})  # status 403

    async def _respond(self, request: Request) -> Response:
        start, status, reason = time.monotonic(), 499, None
        endpoint, model = _find_endpoint(request.scope["path"])
        try:
            response = await self._route(request, endpoint, model)
            status = response.status_code
            return response
        except HttpError as error:
            status, reason = error.status, error.reason
            return JSONResponse({"error": error.message}, status, error.headers)
        except Exception:
            status = 500
            _LOGGER.exception("request failed")
            return JSONResponse({"error": "the model failed; see the log of the service"}, status)
        finally:
            known_model = model if model in self._models else ""
            self._metrics.count_request(endpoint or "", known_model, status, time.monotonic() - start, reason)

    async def _route(self, request: Request, endpoint: str | None, model: str) -> Response:
        client = _client_address(request.scope)
        if self._token_digests and endpoint != "/health":
            token = find_token(request.headers.get("authorization"), self._token_digests)
            if token is None:
                message = "a valid token is missing; send the header Authorization: Bearer <token>"
                raise HttpError(401, message, {"WWW-Authenticate": 'Bearer realm="mmap-clip"'}, "token")
            client = f"{token} {client}"
        if endpoint is None:
            endpoints = ", ".join(f"{methods[0]} {path}" for path, methods in _ENDPOINTS.items())
            raise HttpError(404, f"unknown path; the endpoints are {endpoints}")
        if request.method not in (methods := _ENDPOINTS[endpoint]):
            raise HttpError(
                405,
                f"method {request.method} not allowed; {endpoint} takes {' and '.join(methods)}",
                {"Allow": ", ".join(methods)},
            )
        match endpoint:
            case "/health":
                return await self._health()
            case "/models":
                return JSONResponse({"models": {name: self._describe_model(name) for name in self._models}})
            case "/metrics":
                return Response(self._metrics.text(), media_type=CONTENT_TYPE)
            case "/openapi.json":
                return JSONResponse(self._openapi)
        return await self._predict(request, model, client)

    async def _health(self) -> Response:
        if await self._ready():
            return JSONResponse({"status": "ready"})
        raise HttpError(503, "no replica is ready", retry_after())

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
            "multi_label": model.multi_label,
        }

    async def _predict(self, request: Request, name: str, client: str) -> Response:
        if name not in self._models:
            raise HttpError(404, f"unknown model {_quote(name)}; the models are {', '.join(self._models)}")
        with self._admission.admit(client) as slot:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    return await self._handle_predict(request, name, slot)
            except TimeoutError:
                message = f"timeout after {self._limits.timeout_s:g} s; send fewer images, or retry later"
                raise HttpError(504, message, reason="timeout") from None
            except NoReplicaError as error:
                raise HttpError(503, f"no replica could answer: {error}", retry_after(), "no replica") from None
            except ClientDisconnect:
                raise HttpError(400, "the client disconnected before the request was complete") from None

    async def _handle_predict(self, request: Request, name: str, slot: Slot) -> Response:
        is_json = _check_headers(request) == "application/json"
        task = self._query_task(request)
        self._check_task(name, task)
        if int(request.headers.get("content-length", 0)) > self._limits.max_request_bytes:
            raise self._admission.too_large()
        body = await self._admission.read_body(slot, request.stream())
        if is_json:
            images, task = await self._pool.run(slot.client, len(body), self._parse_json, body, task)
        else:
            images = [await self._pool.run(slot.client, len(body), _encoded_image, body)]
        named_task = self._check_task(name, task)
        num_pixels = sum(image.cost for image in images)
        if num_pixels > self._limits.max_pixels:
            raise HttpError(
                413,
                f"the images have {num_pixels / 1e6:,.0f} megapixels in all, the limit is "
                f"{self._limits.max_pixels / 1e6:,.0f}; send fewer or smaller images",
                reason="pixels",
            )
        self._admission.hold(slot, len(body) + len(images) * 3 * self._preprocessing.image_size**2)
        del body
        decoded = await asyncio.gather(
            *(self._pool.run(slot.client, image.cost, self._decode, image) for image in images)
        )
        if any(image is None for image in decoded):
            raise HttpError(503, "out of memory while decoding the images; retry later", retry_after(), "memory")
        pixels = [image for image in decoded if isinstance(image, np.ndarray)]
        answer = Answer([], 0)
        if pixels:
            answer = await self._predict_pixels(slot.client, name, task, np.stack(pixels))
        self._metrics.count_images(name, len(pixels), len(decoded) - len(pixels), answer.batch_size)
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
            raise HttpError(422, f"unknown query parameter {_quote(unknown[0])}; the only one is task")
        if len(parameters) > 1:
            raise HttpError(422, "task is given more than once; give one, or none for all tasks")
        return parameters[0][1] if parameters else None

    def _parse_json(self, body: bytes, task: str | None) -> tuple[list[_EncodedImage], str | None]:
        try:
            values = json.loads(body, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"the body is not valid JSON: {error}") from None
        schema = '{"images": ["<base64>", ...], "task": "<task>"}'
        if not isinstance(values, dict):
            raise HttpError(422, f"invalid JSON body; expected {schema}, task optional")
        if unknown := [key for key in values if key not in ("images", "task")]:
            hint = did_you_mean(unknown[0], ("images", "task"))
            raise HttpError(422, f"unknown key {_quote(unknown[0])}{hint} Expected {schema}, task optional")
        images, body_task = values.get("images"), values.get("task")
        if not isinstance(images, list) or not images:
            raise HttpError(422, f"images must be a list of base64 strings, and not empty; expected {schema}")
        if len(images) > self._limits.max_images:
            message = f"{len(images):,} images exceed the limit of {self._limits.max_images:,}; send several requests"
            raise HttpError(413, message, reason="images")
        if not (body_task is None or isinstance(body_task, str)):
            raise HttpError(422, f"task must be a string; expected {schema}")
        if body_task is not None and task is not None and body_task != task:
            raise HttpError(422, f"task is {_quote(body_task)} in the body but {_quote(task)} in the query; give one")
        return [_encoded_image(image) for image in images], task if body_task is None else body_task

    def _check_task(self, name: str, task: str | None) -> str | None:
        """Return the task, or the only one of the model."""
        tasks = self._models[name].labels
        if task is not None and task not in tasks:
            raise HttpError(422, f"unknown task {_quote(task)}; model {name!r} has the tasks {', '.join(tasks)}")
        return task or (next(iter(tasks)) if len(tasks) == 1 else None)

    def _decode(self, image: _EncodedImage) -> np.ndarray | str | None:
        """Return the pixels (3, S, S), or the error of a broken image, or None if the memory does not suffice."""
        try:
            return image.error or evaluation_pixels(image.data, self._preprocessing)
        except BrokenImage as error:
            return _error_text(error)
        except MemoryError:
            return None


@dataclass(frozen=True)
class _EncodedImage:
    data: bytes = b""
    error: str = ""
    cost: int = 0
    """`num_pixels_to_decode`."""


def _encoded_image(image: object) -> _EncodedImage:
    """Read an image of a request as far as its size."""
    try:
        if not (data := decode_sent_image(image)):
            raise BrokenImage("no bytes")
    except BrokenImage as error:
        return _EncodedImage(error=_error_text(error))
    return _EncodedImage(data, cost=num_pixels_to_decode(data))


def _find_endpoint(path: str) -> tuple[str | None, str]:
    """Return the endpoint of a path, and the model that it names."""
    match path.split("/")[1:]:
        case ["models", model, "predict"]:
            return "/models/<model>/predict", model
    return path if path in _ENDPOINTS else None, ""


def _client_address(scope: Scope) -> str:
    """Return the address of the client; of an IPv6 address its network of 64 bits, all of which one client may have."""
    host = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def _check_headers(request: Request) -> str:
    """Return the media type of the body."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_image = content_type.startswith("image/") or content_type == "application/octet-stream"
    if not (is_image or content_type == "application/json"):
        raise HttpError(
            415,
            f"unsupported Content-Type {_quote(content_type)}; send an image as image/*, or several as "
            "application/json",
            {"Accept-Post": "image/*, application/json"},
        )
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("identity", ""):
        message = f"unsupported Content-Encoding {_quote(encoding)}; send the body without compression"
        raise HttpError(415, message, {"Accept-Encoding": "identity"})
    return content_type


def _quote(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "...")


def _error_text(error: BrokenImage) -> str:
    return escape_controls(str(error)) or type(error).__name__


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has the same key twice")
    return values
