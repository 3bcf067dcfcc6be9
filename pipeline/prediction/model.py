"""A trained model that classifies images: paths, encoded or decoded images in, classes and probabilities out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.clip.towers import ClipTowers
from pipeline.data.images import BrokenImage, evaluation_pixels, read_image
from pipeline.data.prefetch import prefetch
from pipeline.errors import UserError, escape_controls
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.prediction.calibration import fit_temperature
from pipeline.prediction.options import ModelOptions, write_options

BATCH_SIZE = 64
PREFETCH_BATCHES = 2
"""Batches that are decoded before they are asked for; they bound the memory."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, an encoded image, or a decoded one: Pillow's, or uint8 (H, W), (H, W, 3) or (H, W, 4)."""
_SOURCES = (str, os.PathLike, bytes, Image.Image, np.ndarray)
"""The same for isinstance, which takes no os.PathLike[str]."""


@dataclass(frozen=True)
class ImagePrediction:
    """Of one image by one task's classes; of a broken image there is `error` alone."""

    task: str | None
    label: str | None
    """The most probable class; None: its probability is below the model's threshold, or the image is broken."""
    probability: float | None
    """Of the most probable class, 0 to 1."""
    probabilities: dict[str, float]
    """Of all classes of the task, in the order of `TrainedModel.labels`."""
    error: str = ""
    by_task: dict[str, ImagePrediction] = field(default_factory=dict)
    """Where no task was asked for: that of each task, of which this is the most probable."""

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = self.by_task.values()
        return {
            "task": self.task,
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
            "error": self.error,
            "by_task": [{"task": p.task, "label": p.label, "probability": p.probability} for p in found],
        }


class TrainedModel:
    """A frozen CLIP with trained prompts, whose text features are computed once, here.

    Args:
        prompts: of one or several groups of tasks.
        options: temperatures, threshold, and where the CLIP weights are.
        device: torch's name of it; None: a GPU if there is one.
        threads: that decode images; None: as many as there are cores.
        file: where the prompts were read from, to save options beside it.
        towers: the CLIP on the device, to be shared with other models (`TrainedAdapter.classifier`); None: it is loaded
            here.

    Raises:
        UserError: no such device, CLIP weights that are not there or not those of the training, options that do not fit
            the tasks.
    """

    def __init__(
        self,
        prompts: TrainedAdapter,
        options: ModelOptions | None = None,
        device: str | None = None,
        threads: int | None = None,
        file: Path | None = None,
        towers: ClipTowers | None = None,
    ):
        self._labels = prompts.labels
        self.options = options or ModelOptions()
        self.options.check(self._labels)
        self._file = file
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
        self.classifier = prompts.classifier(device, self.options.pretrained, towers)
        self._decoding = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "decode")

    @property
    def tasks(self) -> list[str]:
        return list(self._labels)

    @property
    def image_size(self) -> int:
        """Side of the pixels that `predict_pixels` takes."""
        return self.classifier.towers.image_size

    def labels(self, task: str) -> list[str]:
        """What a task's classes are called: the first name of each. Raises: UserError: no such task."""
        return list(self._labels[self._known(task)])

    def temperature(self, task: str) -> float:
        """What the task's logits are divided by."""
        return self.options.temperatures.get(task, 1.0)

    def predict(self, images: Sequence[ImageSource], task: str | None = None) -> list[ImagePrediction]:
        """A prediction for each image, in order.

        Args:
            task: whose classes; None: the only task's, or all tasks', of which the most probable is the answer. That
                costs a pass of the image tower for each task with image prompts of its own.

        Raises:
            UserError: no such task.
            TypeError: what is no image in any form.
        """
        if isinstance(images, _SOURCES):
            raise TypeError("images must be a list, also of one image")
        return list(self.predict_stream(images, task))

    def predict_stream(self, images: Iterable[ImageSource], task: str | None = None) -> Iterator[ImagePrediction]:
        """As `predict`, of any number of images, which are decoded in threads while the model runs."""
        tasks = self.asked_for(task)
        for pixels, errors in self._decoded(images):
            good = [at for at, error in enumerate(errors) if not error]
            predicted = self._predict(pixels if len(good) == len(errors) else pixels[good], tasks, task)
            for error in errors:
                yield ImagePrediction(task, None, None, {}, error) if error else next(predicted)

    def predict_pixels(self, pixels: torch.Tensor, task: str | None = None) -> list[ImagePrediction]:
        """As `predict`, of uint8 (B, 3, S, S) with S = `image_size`, as `pipeline.data.images.evaluation_pixels` makes
        them."""
        return list(self._predict(pixels, self.asked_for(task), task))

    def asked_for(self, task: str | None) -> list[str]:
        """The tasks whose logits answer `task`. Raises: UserError: no such task."""
        return self.tasks if task is None else [self._known(task)]

    def predictions(self, logits: Mapping[str, torch.Tensor], task: str | None) -> Iterator[ImagePrediction]:
        """Of B images, by the classifier's logits (B, C) of each task of `asked_for(task)`."""
        of_tasks = {}
        for name, values in logits.items():
            of_tasks[name] = (values / self.temperature(name)).softmax(dim=1).cpu().numpy()
        for rows in zip(*of_tasks.values()):
            found = {name: self._prediction(name, row) for name, row in zip(of_tasks, rows)}
            best = max(found.values(), key=lambda prediction: prediction.probability or 0.0)
            if task is None and len(self._labels) > 1:
                best = ImagePrediction(best.task, best.label, best.probability, best.probabilities, by_task=found)
            yield best

    def calibrate(self, images: Sequence[ImageSource], labels: Sequence[str], task: str) -> float:
        """Fits the task's temperature to images with known classes that were not trained on, uses it from now on, and
        returns it.

        Args:
            labels: class of each image, as `labels(task)` spells it.

        Raises:
            UserError: no such task or class, a broken image, or images on which no temperature can be fitted.
        """
        known = self.labels(task)
        if len(images) != len(labels) or not images:
            raise UserError(f"{len(images)} images with {len(labels)} labels: give a label for each of some images")
        if unknown := [label for label in labels if label not in known]:
            raise UserError(f"label {unknown[0]!r} is no class of task {task!r}: {', '.join(known)}")
        logits = []
        for number, (pixels, errors) in enumerate(self._decoded(images)):
            for at, error in enumerate(errors, number * BATCH_SIZE):
                if error:
                    raise UserError(f"image {at} to calibrate with is broken: {error}")
            logits.append(self.classifier.logits([task], pixels)[task].cpu())
        temperature = fit_temperature(torch.cat(logits), torch.tensor([known.index(label) for label in labels]), task)
        temperatures = {**self.options.temperatures, task: temperature}
        self.options = self.options.model_copy(update={"temperatures": temperatures})
        return temperature

    def save_options(self) -> Path:
        """Writes temperatures, threshold, and place of the CLIP weights beside the prompts file, where `pipeline.load`
        finds them; returns the JSON file.

        Raises:
            UserError: the prompts do not lie in a folder of this machine, or it cannot be written.
        """
        if self._file is None:
            raise UserError("these prompts were not read from a file of this machine: load a copy, and save there")
        return write_options(self._file, self.options)

    def _decoded(self, images: Iterable[ImageSource]) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Batches of pixels uint8 (B, 3, S, S), and what is wrong with each image, decoded AHEAD batches before."""
        images = iter(images)

        def started() -> Iterator[tuple[torch.Tensor, list[Future[str]]]]:
            while batch := list(islice(images, BATCH_SIZE)):
                pixels = torch.zeros(len(batch), 3, self.image_size, self.image_size, dtype=torch.uint8)
                yield pixels, [self._decoding.submit(_decode, *pair) for pair in zip(batch, pixels.numpy())]

        for pixels, decoding in prefetch(started(), PREFETCH_BATCHES):
            yield pixels, [image.result() for image in decoding]

    def _predict(
        self, pixels: torch.Tensor, tasks: Sequence[str], task: str | None = None
    ) -> Iterator[ImagePrediction]:
        if len(pixels):
            yield from self.predictions(self.classifier.logits(tasks, pixels), task)

    def _prediction(self, task: str, probabilities: np.ndarray) -> ImagePrediction:
        labels, values = self._labels[task], probabilities.tolist()
        best = int(probabilities.argmax())
        label = labels[best] if values[best] >= (self.options.threshold or 0) else None
        return ImagePrediction(task, label, values[best], dict(zip(labels, values)))

    def _known(self, task: str) -> str:
        if task not in self._labels:
            raise UserError(f"task {task!r} is none of this model's: {', '.join(self._labels)}")
        return task


def _decode(image: ImageSource, slot: np.ndarray) -> str:
    """Writes the image's pixels into `slot` (3, S, S); returns what is wrong with it."""
    if not isinstance(image, _SOURCES):
        raise TypeError(f"{type(image).__name__} is no image: give a path, bytes, a Pillow image or a uint8 array")
    try:
        if isinstance(image, str | os.PathLike):
            image = read_image(Path(image))
        elif isinstance(image, np.ndarray):
            image = _from_array(image)
        slot[:] = evaluation_pixels(image, slot.shape[-1])
        return ""
    except (BrokenImage, OSError) as error:
        return escape_controls(str(error)) or type(error).__name__


def _from_array(values: np.ndarray) -> Image.Image:
    shaped = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if values.dtype != np.uint8 or not shaped or not values.size:
        raise BrokenImage(f"an array of {values.dtype} {values.shape} is none of uint8 (H, W), (H, W, 3), (H, W, 4)")
    return Image.fromarray(values)
