"""Ingress of the service: reads and decodes requests, and retries when a replica dies. Its process needs no torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from pipeline.data.preprocessing import Preprocessing
from pipeline.serving.admission import Limits
from pipeline.serving.http_api import Answer, HttpApi, NoReplicaError, ServedModel

MAX_ATTEMPTS = 4
"""Attempts per call, each on any replica."""
RETRY_DELAY_S = 0.2
MAX_CALL_BYTES = 3 * 2**20
"""Pixels per call: Serve's gRPC takes 4 MiB. A larger request becomes several calls, for several replicas."""
READY_TIMEOUT_S = 5
"""A replica that has answered within this time, or does so now, is ready."""


class Ingress:
    """Ingress that retries predictions, but not decoding, so that an image that crashes a decoder does so once."""

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        models: dict[str, ServedModel],
        preprocessing: Preprocessing,
        limits: Limits,
        token_digests: Sequence[str] = (),
    ):
        self._replicas = replicas
        self._last_answer_time = -float("inf")
        self.api = HttpApi(models, preprocessing, limits, self._predict, self._ready, token_digests)

    async def _predict(self, client: str, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        chunk_size = max(1, MAX_CALL_BYTES // pixels[0].nbytes)
        chunks = [pixels[start : start + chunk_size] for start in range(0, len(pixels), chunk_size)]
        answers = await asyncio.gather(*(self._predict_chunk(client, model, task, chunk) for chunk in chunks))
        records = [record for answer in answers for record in answer.records]
        return Answer(records, max(answer.batch_size for answer in answers))

    async def _predict_chunk(self, client: str, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        for attempt in range(MAX_ATTEMPTS):
            await asyncio.sleep(attempt * RETRY_DELAY_S)
            try:
                answer: Answer = await self._replicas.predict.remote(client, model, task, pixels)
            except (RayError, RayServeException) as error:
                failure = error
            else:
                self._last_answer_time = time.monotonic()
                return answer
        if isinstance(failure, RayTaskError):
            raise failure  # the model's own error: status 500
        raise NoReplicaError(type(failure).__name__)

    async def _ready(self) -> bool:
        if time.monotonic() - self._last_answer_time < READY_TIMEOUT_S:
            return True
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return bool(await self._replicas.ready.remote())
        except (RayError, RayServeException, TimeoutError):
            return False


class IngressApp:
    """ASGI application of a deployed `Ingress`, for `serve.ingress`, which knows no application of an instance."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the replica starts or stops; the instance does not exist yet or any more
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        ingress: Any = serve.get_replica_context().servable_object
        await ingress.api(scope, receive, send)
