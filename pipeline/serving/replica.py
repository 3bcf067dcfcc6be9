"""A replica of the service: holds all models, and runs what is asked of them in batches."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray
import torch

from pipeline.runtime.cluster import WorkerResources
from pipeline.serving.dynamic_batcher import DynamicBatcher
from pipeline.serving.http_api import Answer
from pipeline.serving.mixed_batch import PredictRequest, predict_batch
from pipeline.serving.shared_clip import Trained, load_models

_Call = tuple[str, str | None, np.ndarray]
"""Arguments of `ModelReplica.predict`."""


class ModelReplica:
    """
    Args:
        trained: reference in Ray's store to what `load_models` takes; in a list, for Ray would resolve it.
        max_batch: images that the model takes at once.
        batch_wait_s: how long a request waits for others to fill the batch.

    Raises:
        UserError: as `load_models`.
    """

    def __init__(
        self,
        trained: list[ray.ObjectRef[Trained]],
        worker_resources: WorkerResources,
        max_batch: int,
        batch_wait_s: float,
    ):
        if not worker_resources.gpus:
            torch.set_num_threads(worker_resources.cpus)
        self._models = load_models(ray.get(trained[0]), "cuda" if worker_resources.gpus else "cpu")
        self._max_batch = max_batch
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._batches = DynamicBatcher(self._predict_batch, lambda call: len(call[2]), max_batch, batch_wait_s)
        self._has_answered = False
        self._warm_up()  # what is slow the first time is done before the first request

    async def predict(self, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        """Of uint8 pixels (B, 3, S, S); such a model and task there must be."""
        return await self._batches.ask((model, task, pixels))

    async def ready(self) -> bool:
        return True

    async def check_health(self) -> None:
        """Runs the models, unless they have answered since the last time. What they raise makes Serve replace the
        replica."""
        if not self._has_answered:
            await asyncio.get_running_loop().run_in_executor(self._model_thread, self._warm_up)
        self._has_answered = False

    async def _predict_batch(self, asked: list[_Call]) -> list[Answer]:
        answers = await asyncio.get_running_loop().run_in_executor(self._model_thread, self._predict, asked)
        self._has_answered = True
        return answers

    def _predict(self, asked: list[_Call]) -> list[Answer]:
        batch = [PredictRequest(self._models[name], task, torch.tensor(pixels)) for name, task, pixels in asked]
        num_images = sum(len(one.pixels) for one in batch)
        found = predict_batch(batch, self._max_batch)
        return [Answer([prediction.record() for prediction in predictions], num_images) for predictions in found]

    def _warm_up(self) -> None:
        for model in self._models.values():
            size = model.image_size
            model.predict_pixels(torch.zeros(1, 3, size, size, dtype=torch.uint8), model.tasks[0])
