"""A trained model for image classification: from paths, encoded or decoded images to classes and probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.clip.towers import ClipTowers
from pipeline.data.images import BrokenImage, evaluation_pixels, read_image
from pipeline.data.prefetch import prefetch
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError, escape_controls
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.prediction.calibration import fit_temperature
from pipeline.prediction.options import ModelOptions, write_options

BATCH_SIZE = 64
PREFETCH_BATCHES = 2
"""Batches that are decoded ahead of the model; they bound the memory."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, an encoded image, a Pillow image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4)."""
_IMAGE_TYPES = (str, os.PathLike, bytes, Image.Image, np.ndarray)
"""The same for isinstance, which does not accept os.PathLike[str]."""


@dataclass(frozen=True)
class ImagePrediction:
    """Prediction for one image among the classes of one task; for a broken image only `error` is set."""

    task: str | None
    label: str | None
    """The most probable class; None if its probability is below the threshold or the image is broken."""
    probability: float | None
    """Probability of the most probable class, 0 to 1."""
    probabilities: dict[str, float]
    """Class → probability, in the order of `TrainedModel.labels`."""
    error: str = ""
    predictions_by_task: dict[str, ImagePrediction] = field(default_factory=dict)
    """Without a requested task: the prediction of each task, of which this is the most probable; else empty."""

    def record(self) -> dict[str, Any]:
        """Return the prediction as a JSON object."""
        return {
            "task": self.task,
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
            "error": self.error,
            "predictions_by_task": [
                {"task": task, "label": prediction.label, "probability": prediction.probability}
                for task, prediction in self.predictions_by_task.items()
            ],
        }


class TrainedModel:
    """A frozen CLIP with a trained adapter; the text features are computed once, on construction.

    Args:
        adapter: of one or several groups of tasks.
        options: temperatures, threshold, and source of the CLIP weights.
        device: torch device; None: cuda if available, else cpu.
        threads: number of decoding threads; None: number of cores.
        file: file of the adapter, next to which `save_options` writes.
        towers: CLIP on the device, shared with other models (`TrainedAdapter.classifier`); None: loaded here.

    Raises:
        UserError: unavailable device, missing CLIP weights or other ones than in training, options of unknown tasks.
    """

    def __init__(
        self,
        adapter: TrainedAdapter,
        options: ModelOptions | None = None,
        device: str | None = None,
        threads: int | None = None,
        file: Path | None = None,
        towers: ClipTowers | None = None,
    ):
        self._labels = adapter.labels
        self.options = options or ModelOptions()
        self.options.check_tasks(self._labels)
        self._file = file
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from None
        self.classifier = adapter.classifier(device, self.options.pretrained, towers)
        self._threads = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "decode")

    @property
    def tasks(self) -> list[str]:
        return list(self._labels)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images, as in training."""
        return self.classifier.towers.preprocessing

    def labels(self, task: str) -> list[str]:
        """Return the labels of a task's classes: the first name of each. Raises: UserError: unknown task."""
        self._check_task(task)
        return list(self._labels[task])

    def temperature(self, task: str) -> float:
        """Return the softmax temperature of the task."""
        return self.options.temperatures.get(task, 1.0)

    def predict(self, images: Sequence[ImageSource], task: str | None = None) -> list[ImagePrediction]:
        """Return a prediction for each image, in order.

        Args:
            task: task whose classes are predicted; None: all tasks, of which the most probable prediction is returned.
                That takes one forward pass of the image tower for each task with its own image prompts.

        Raises:
            UserError: unknown task.
            TypeError: an image of an unsupported type.
        """
        if isinstance(images, _IMAGE_TYPES):
            raise TypeError("images must be a list, even for one image")
        return list(self.predict_stream(images, task))

    def predict_stream(self, images: Iterable[ImageSource], task: str | None = None) -> Iterator[ImagePrediction]:
        """Yield the predictions of `predict` for any number of images, decoded in threads while the model runs."""
        tasks = self.resolve_tasks(task)
        for pixels, errors in self._decode_batches(images):
            valid_rows = [row for row, error in enumerate(errors) if not error]
            predictions = self._predict(pixels if len(valid_rows) == len(errors) else pixels[valid_rows], tasks, task)
            for error in errors:
                yield ImagePrediction(task, None, None, {}, error) if error else next(predictions)

    def predict_pixels(self, pixels: torch.Tensor, task: str | None = None) -> list[ImagePrediction]:
        """Return the predictions of `predict` for uint8 pixels (B, 3, S, S) from
        `pipeline.data.images.evaluation_pixels` with the model's `preprocessing`."""
        return list(self._predict(pixels, self.resolve_tasks(task), task))

    def resolve_tasks(self, task: str | None) -> list[str]:
        """Return [task], or all tasks for None. Raises: UserError: unknown task."""
        if task is None:
            return self.tasks
        self._check_task(task)
        return [task]

    def predictions_from_logits(
        self, logits_by_task: Mapping[str, torch.Tensor], task: str | None
    ) -> Iterator[ImagePrediction]:
        """Yield the predictions for B images, from logits (B, C) for each task of `resolve_tasks(task)`."""
        probabilities = {}
        for name, logits in logits_by_task.items():
            probabilities[name] = (logits / self.temperature(name)).softmax(dim=1).cpu().numpy()
        for rows in zip(*probabilities.values()):
            predictions = {name: self._prediction(name, row) for name, row in zip(probabilities, rows)}
            best = max(predictions.values(), key=lambda prediction: prediction.probability or 0.0)
            if task is None and len(self._labels) > 1:
                best = replace(best, predictions_by_task=predictions)
            yield best

    def calibrate(self, images: Sequence[ImageSource], labels: Sequence[str], task: str) -> float:
        """Fit the task's temperature to labeled images that are not in the training set, set it, and return it.

        Args:
            labels: class of each image, one of `labels(task)`.

        Raises:
            UserError: unknown task or class, a broken image, or images to which no temperature can be fitted.
        """
        task_labels = self.labels(task)
        if len(images) != len(labels) or not images:
            raise UserError(
                f"{len(images)} images but {len(labels)} labels; expected one label per image, and at least one"
            )
        if unknown := [label for label in labels if label not in task_labels]:
            raise UserError(f"unknown label {unknown[0]!r}; task {task!r} has the classes {', '.join(task_labels)}")
        logits = []
        for batch_index, (pixels, errors) in enumerate(self._decode_batches(images)):
            for image_index, error in enumerate(errors, batch_index * BATCH_SIZE):
                if error:
                    raise UserError(f"calibration image {image_index} is broken: {error}")
            logits.append(self.classifier.logits([task], pixels)[task].cpu())
        targets = torch.tensor([task_labels.index(label) for label in labels])
        temperature = fit_temperature(torch.cat(logits), targets, task)
        temperatures = {**self.options.temperatures, task: temperature}
        self.options = self.options.model_copy(update={"temperatures": temperatures})
        return temperature

    def save_options(self) -> Path:
        """Save temperatures, threshold and source of the CLIP weights next to the adapter file, for `pipeline.load`;
        return the path of the JSON file.

        Raises:
            UserError: the adapter was not loaded from a local file, or the JSON file cannot be written.
        """
        if self._file is None:
            raise UserError("cannot save options: the adapter was not loaded from a local file; load a local copy")
        return write_options(self._file, self.options)

    def _decode_batches(self, images: Iterable[ImageSource]) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Yield batches of uint8 pixels (B, 3, S, S) and the error of each image, PREFETCH_BATCHES ahead."""
        images, preprocessing = iter(images), self.preprocessing
        size = preprocessing.image_size

        def start_decoding() -> Iterator[tuple[torch.Tensor, list[Future[str]]]]:
            while batch := list(islice(images, BATCH_SIZE)):
                pixels = torch.zeros(len(batch), 3, size, size, dtype=torch.uint8)
                yield (
                    pixels,
                    [self._threads.submit(_decode_into, *pair, preprocessing) for pair in zip(batch, pixels.numpy())],
                )

        for pixels, errors in prefetch(start_decoding(), PREFETCH_BATCHES):
            yield pixels, [error.result() for error in errors]

    def _predict(
        self, pixels: torch.Tensor, tasks: Sequence[str], task: str | None = None
    ) -> Iterator[ImagePrediction]:
        if len(pixels):
            yield from self.predictions_from_logits(self.classifier.logits(tasks, pixels), task)

    def _prediction(self, task: str, probabilities: np.ndarray) -> ImagePrediction:
        labels, values = self._labels[task], probabilities.tolist()
        best = int(probabilities.argmax())
        label = labels[best] if values[best] >= (self.options.threshold or 0) else None
        return ImagePrediction(task, label, values[best], dict(zip(labels, values)))

    def _check_task(self, task: str) -> None:
        if task not in self._labels:
            raise UserError(f"unknown task {task!r}; the model has the tasks {', '.join(self._labels)}")


def _decode_into(image: ImageSource, pixels: np.ndarray, preprocessing: Preprocessing) -> str:
    """Decode the image into `pixels` (3, S, S); return the error, or "" on success."""
    if not isinstance(image, _IMAGE_TYPES):
        raise TypeError(
            f"unsupported image type {type(image).__name__}; use a path, bytes, a Pillow image or a uint8 array"
        )
    try:
        if isinstance(image, str | os.PathLike):
            image = read_image(Path(image))
        elif isinstance(image, np.ndarray):
            image = _array_to_image(image)
        pixels[:] = evaluation_pixels(image, preprocessing)
        return ""
    except (BrokenImage, OSError) as error:
        return escape_controls(str(error)) or type(error).__name__


def _array_to_image(array: np.ndarray) -> Image.Image:
    has_image_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not has_image_shape or not array.size:
        raise BrokenImage(f"array of {array.dtype} {array.shape}; expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
    return Image.fromarray(array)
