"""A trained model for image classification: from paths, encoded or decoded images to classes and probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch

from pipeline.clip.towers import ClipTowers
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.data.images import evaluation_pixels
from pipeline.data.names import LABEL_SEPARATOR, LABEL_THRESHOLD
from pipeline.data.prefetch import prefetch
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError, escape_controls
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.prediction.calibration import fit_temperature
from pipeline.prediction.image_prediction import ImagePrediction
from pipeline.prediction.image_sources import (
    ImageSource,
    UnnamedImage,
    expand_folders,
    is_folder,
    is_single_image,
    read_source,
    source_path,
)
from pipeline.prediction.options import ModelOptions, write_options

BATCH_SIZE = 64
PREFETCH_BATCHES = 2
"""Batches that are decoded ahead of the model; they bound the memory."""


class TrainedModel:
    """A frozen CLIP with a trained adapter; the text features are computed once, on construction.

    Args:
        adapter: of one or several groups of tasks.
        options: temperatures, threshold, precision, and source of the CLIP weights.
        device: torch device; None: cuda if available, else cpu.
        threads: number of decoding threads; None: number of cores that the process may use.
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
            raise UserError(f"device {device!r} is not available: {str(error).splitlines()[0]}; use cpu") from None
        self.classifier = adapter.classifier(device, self.options.pretrained, towers, self.options.precision)
        limit_threads()
        self._threads = ThreadPoolExecutor(threads or usable_cpus()[0], "decode")

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
        """Return the temperature of the task."""
        return self.options.temperatures.get(task, 1.0)

    def threshold(self, task: str) -> float | None:
        """Return the probability from which a class is predicted; None: the most probable one always is."""
        if self.options.threshold is None and task in self.classifier.logit_biases:
            return LABEL_THRESHOLD
        return self.options.threshold

    @overload
    def predict(self, images: str | os.PathLike[str], task: str | None = None) -> Any: ...  # a list for a folder

    @overload
    def predict(  # type: ignore[overload-overlap]  # bytes, arrays and files are iterable
        self, images: UnnamedImage, task: str | None = None
    ) -> ImagePrediction: ...

    @overload
    def predict(self, images: Iterable[ImageSource], task: str | None = None) -> list[ImagePrediction]: ...

    def predict(
        self, images: ImageSource | Iterable[ImageSource], task: str | None = None
    ) -> ImagePrediction | list[ImagePrediction]:
        """Return the prediction for one image, or a list of predictions for several images or a folder, in order.

        Args:
            images: one image or several; a broken one gets a prediction with `error`. A folder is replaced by the
                images in it, at any depth. URLs are read from this process, with limits on size and time.
            task: task whose classes are predicted; None: all tasks, of which the most probable prediction is returned.
                That takes one forward pass of the image tower for each task with its own image prompts.

        Raises:
            UserError: unknown task, a folder without images.
            TypeError: neither an image nor a list.
        """
        predictions = list(self.predict_stream(images, task))
        return predictions[0] if is_single_image(images) and not is_folder(images) else predictions

    def predict_stream(
        self, images: ImageSource | Iterable[ImageSource], task: str | None = None
    ) -> Iterator[ImagePrediction]:
        """Yield the predictions of `predict` for any number of images, decoded in threads while the model runs."""
        tasks = self.resolve_tasks(task)
        if is_single_image(images):
            images = [images]
        images = cast(Iterable[ImageSource], images)
        named_task = tasks[0] if len(tasks) == 1 else None
        for batch, pixels, errors in self._decode_batches(expand_folders(images)):
            valid_rows = [row for row, error in enumerate(errors) if not error]
            predictions = self._predict(pixels if len(valid_rows) == len(errors) else pixels[valid_rows], tasks, task)
            for source, error in zip(batch, errors):
                path = source_path(source)
                yield ImagePrediction(path, named_task, error=error) if error else replace(next(predictions), path=path)

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
            scaled = logits / self.temperature(name)
            probabilities[name] = self.classifier.to_probabilities(name, scaled).cpu().numpy()
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
            UserError: unknown task or class, a task with several labels per image, a broken image, or images to which
                no temperature can be fitted.
        """
        task_labels = self.labels(task)
        if task in self.classifier.logit_biases:
            raise UserError(
                f"images of task {task!r} may have several labels, for which no temperature is fitted: set one with "
                "temperature=, or a threshold"
            )
        if len(images) != len(labels) or not len(images):
            raise UserError(
                f"{len(images)} images but {len(labels)} labels; expected one label per image, and at least one"
            )
        if unknown := [label for label in labels if label not in task_labels]:
            raise UserError(f"unknown label {unknown[0]!r}; task {task!r} has the classes {', '.join(task_labels)}")
        logits = []
        for batch_index, (_, pixels, errors) in enumerate(self._decode_batches(images)):
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

    def _decode_batches(
        self, images: Iterable[ImageSource]
    ) -> Iterator[tuple[list[ImageSource], torch.Tensor, list[str | None]]]:
        """Yield batches of images, their uint8 pixels (B, 3, S, S) and errors, PREFETCH_BATCHES ahead."""
        images, preprocessing = iter(images), self.preprocessing
        size = preprocessing.image_size

        def start_decoding() -> Iterator[tuple[list[ImageSource], torch.Tensor, list[Future[str | None]]]]:
            while batch := list(islice(images, BATCH_SIZE)):
                pixels = torch.zeros(len(batch), 3, size, size, dtype=torch.uint8)
                yield (
                    batch,
                    pixels,
                    [self._threads.submit(_decode_into, *pair, preprocessing) for pair in zip(batch, pixels.numpy())],
                )

        for batch, pixels, errors in prefetch(start_decoding(), PREFETCH_BATCHES):
            yield batch, pixels, [error.result() for error in errors]

    def _predict(
        self, pixels: torch.Tensor, tasks: Sequence[str], task: str | None = None
    ) -> Iterator[ImagePrediction]:
        if len(pixels):
            yield from self.predictions_from_logits(self.classifier.logits(tasks, pixels), task)

    def _prediction(self, task: str, probabilities: np.ndarray) -> ImagePrediction:
        labels, values = self._labels[task], probabilities.tolist()
        best, threshold = int(probabilities.argmax()), self.threshold(task) or 0
        label: str | None
        if task in self.classifier.logit_biases:
            names = [name for name, value in zip(labels, values) if value >= threshold]
            label = LABEL_SEPARATOR.join(names) or None
        else:
            label = labels[best] if values[best] >= threshold else None
        return ImagePrediction(None, task, label, values[best], None, dict(zip(labels, values)))

    def _check_task(self, task: str) -> None:
        if not isinstance(task, str) or task not in self._labels:
            raise UserError(f"unknown task {task!r}; the model has the tasks {', '.join(self._labels)}")


def _decode_into(source: ImageSource, pixels: np.ndarray, preprocessing: Preprocessing) -> str | None:
    """Decode the image into `pixels` (3, S, S); return the error, or None on success."""
    try:
        pixels[:] = evaluation_pixels(read_source(source), preprocessing)
        return None
    except (OSError, ValueError, SyntaxError) as error:  # the last two also from Pillow images of the caller
        return escape_controls(str(error)) or type(error).__name__
