"""A replica of the service: holds all models and predicts in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.runtime.cluster import WorkerResources
from pipeline.serving.dynamic_batcher import DynamicBatcher
from pipeline.serving.http_api import Answer
from pipeline.serving.mixed_batch import PredictRequest, predict_batch
from pipeline.serving.shared_clip import NamedAdapters, load_models

_Call = tuple[str, str | None, np.ndarray]
"""Model, task and pixels."""


class ModelReplica:
    """
    Args:
        get_adapters: returns the argument of `load_models`.
        max_batch: maximum batch size.
        batch_wait_s: batch wait timeout.

    Raises:
        UserError: as `load_models`.
    """

    def __init__(
        self,
        get_adapters: Callable[[], NamedAdapters],
        worker_resources: WorkerResources,
        max_batch: int,
        batch_wait_s: float,
    ):
        if not worker_resources.gpus:
            torch.set_num_threads(worker_resources.cpus)
        self._models = load_models(get_adapters(), "cuda" if worker_resources.gpus else "cpu")
        self._max_batch = max_batch
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._batcher = DynamicBatcher(self._predict_batch, lambda call: len(call[2]), max_batch, batch_wait_s)
        self._has_answered = False
        self._warm_up()

    async def predict(self, client: str, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        """Predict uint8 pixels (B, 3, S, S); model and task must exist."""
        return await self._batcher.submit(client, (model, task, pixels))

    async def ready(self) -> bool:
        return True

    async def check_health(self) -> None:
        """Run the models unless they have answered since the last check. If they raise, Serve replaces the replica."""
        if not self._has_answered:
            await asyncio.get_running_loop().run_in_executor(self._model_thread, self._warm_up)
        self._has_answered = False

    async def _predict_batch(self, calls: list[_Call]) -> list[Answer]:
        answers = await asyncio.get_running_loop().run_in_executor(self._model_thread, self._predict, calls)
        self._has_answered = True
        return answers

    def _predict(self, calls: list[_Call]) -> list[Answer]:
        requests = [PredictRequest(self._models[name], task, torch.tensor(pixels)) for name, task, pixels in calls]
        batch_size = sum(len(request.pixels) for request in requests)
        batch_predictions = predict_batch(requests, self._max_batch)
        return [Answer([prediction.to_dict() for prediction in items], batch_size) for items in batch_predictions]

    def _warm_up(self) -> None:
        for model in self._models.values():
            size = model.preprocessing.image_size
            model.predict_pixels(torch.zeros(1, 3, size, size, dtype=torch.uint8), model.tasks[0])
