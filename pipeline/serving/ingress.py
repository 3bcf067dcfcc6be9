"""Before the replicas: reads and decodes requests, and asks again when a replica dies. Its process needs no torch."""

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

from pipeline.serving.http_api import Answer, HttpApi, Limits, NoReplica, ServedModel

TRIES = 4
"""Of a call, on one replica after another."""
NEXT_TRY_AFTER_S = 0.2
CALL_BYTES = 3 * 2**20
"""Of pixels in one call, of which Serve's gRPC takes 4 MiB: a larger request becomes several, for several replicas."""
READY_WITHIN_S = 5
"""A replica that answered so recently, or does so now, is ready."""


class Ingress:
    """Predictions are asked for again, for they change nothing. Images are not decoded again: one that breaks a decoder
    does so once."""

    def __init__(
        self, replicas: DeploymentHandle[Any], models: dict[str, ServedModel], image_size: int, limits: Limits
    ):
        self._replicas = replicas
        self._last_answer = -float("inf")
        self._api = HttpApi(models, image_size, limits, self._predict, self._ready)

    async def __call__(self, request: Request) -> Response:
        return await self._api(request)

    async def _predict(self, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        at_once = max(1, CALL_BYTES // pixels[0].nbytes)
        parts = [pixels[start : start + at_once] for start in range(0, len(pixels), at_once)]
        answers = await asyncio.gather(*(self._predict_part(model, task, part) for part in parts))
        records = [record for answer in answers for record in answer.records]
        return Answer(records, max(answer.batch_size for answer in answers))

    async def _predict_part(self, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        for failed in range(TRIES):
            await asyncio.sleep(failed * NEXT_TRY_AFTER_S)
            try:
                answer: Answer = await self._replicas.predict.remote(model, task, pixels)
            except (RayError, RayServeException) as error:
                fault = error
            else:
                self._last_answer = time.monotonic()
                return answer
        if isinstance(fault, RayTaskError):
            raise fault  # of the model itself: Serve logs it, and answers 500
        raise NoReplica(type(fault).__name__)

    async def _ready(self) -> bool:
        if time.monotonic() - self._last_answer < READY_WITHIN_S:
            return True
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                return bool(await self._replicas.ready.remote())
        except (RayError, RayServeException, TimeoutError):
            return False
