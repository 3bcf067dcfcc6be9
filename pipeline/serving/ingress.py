"""Ingress of the service: reads and decodes requests, and retries when a replica dies. Its process needs no torch."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from pipeline.data.preprocessing import Preprocessing
from pipeline.serving.http_api import Answer, HttpApi, Limits, NoReplicaError, ServedModel

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
    ):
        self._replicas = replicas
        self._last_answer_time = -float("inf")
        self._api = HttpApi(models, preprocessing, limits, self._predict, self._ready)

    async def __call__(self, request: Request) -> Response:
        return await self._api(request)

    async def _predict(self, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        chunk_size = max(1, MAX_CALL_BYTES // pixels[0].nbytes)
        chunks = [pixels[start : start + chunk_size] for start in range(0, len(pixels), chunk_size)]
        answers = await asyncio.gather(*(self._predict_chunk(model, task, chunk) for chunk in chunks))
        records = [record for answer in answers for record in answer.records]
        return Answer(records, max(answer.batch_size for answer in answers))

    async def _predict_chunk(self, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        for attempt in range(MAX_ATTEMPTS):
            await asyncio.sleep(attempt * RETRY_DELAY_S)
            try:
                answer: Answer = await self._replicas.predict.remote(model, task, pixels)
            except (RayError, RayServeException) as error:
                failure = error
            else:
                self._last_answer_time = time.monotonic()
                return answer
        if isinstance(failure, RayTaskError):
            raise failure  # the model's own error: Serve logs it and answers 500
        raise NoReplicaError(type(failure).__name__)

    async def _ready(self) -> bool:
        if time.monotonic() - self._last_answer_time < READY_TIMEOUT_S:
            return True
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return bool(await self._replicas.ready.remote())
        except (RayError, RayServeException, TimeoutError):
            return False
