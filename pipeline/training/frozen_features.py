"""Image features of the frozen CLIP, computed once for all methods that leave the image tower as it is or are held to
it.

A step's batch and its augmentation are functions of seed, task and step, so all trainings with the same schedule see
the same images, and the features of every step can be shared like those of the test set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.data.parquet import SplitReader
from pipeline.errors import UserError
from pipeline.training.batches import TrainingSet
from pipeline.training.evaluate import BATCH_SIZE, decoded_batches

_NAME = "features"


@torch.no_grad()
def frozen_training_features(
    towers: ClipTowers,
    training_set: TrainingSet,
    num_steps: int,
    config: TrainingConfig,
    seed: int,
    precision: str,
    on_steps: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """(steps, B, E) of the batches that a training of `num_steps` steps takes; `on_steps` is told how many are done."""
    features = []
    at_once = max(1, BATCH_SIZE // config.batch_size)
    for start in range(0, num_steps, at_once):
        steps = range(start, min(start + at_once, num_steps))
        pixels = [
            training_set.batch(step, config.batch_size, towers.image_size, config.augmentation, seed)[0]
            for step in steps
        ]
        with autocast(towers.device, precision):
            x = towers.encode_image(towers.normalize_pixels(torch.cat(pixels)))
        features.append(x.unflatten(0, (len(steps), config.batch_size)).cpu())
        on_steps(steps.stop)
    return torch.cat(features)


@torch.no_grad()
def frozen_test_features(
    towers: ClipTowers,
    reader: SplitReader,
    task: str,
    threads: int,
    precision: str,
    on_images: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """(N, E) of a task's test set in stored order; `on_images` is told how many are done."""
    features, done = [], 0
    pinned = towers.device.type == "cuda"
    for _, rows, pixels in decoded_batches(reader, [task], towers.image_size, threads, pinned=pinned):
        with autocast(towers.device, precision):
            images = towers.normalize_pixels(pixels.to(towers.device, non_blocking=pinned))
            features.append(towers.encode_image(images).cpu())
        on_images(done := done + len(rows))
    return torch.cat(features)


def save_features(path: Path, features: torch.Tensor) -> None:
    save_file({_NAME: features.contiguous()}, path)


class StoredFeatures:
    """Features of a file, of which only the rows asked for are read.

    Raises:
        UserError: a file that is missing, damaged, or holds something else.
    """

    def __init__(self, path: Path):
        try:
            self._slices = safe_open(path, "pt").get_slice(_NAME)
            shape, dtype = self._slices.get_shape(), self._slices.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as image features: {error}; remove {path.parent}") from None
        if len(shape) not in (2, 3) or dtype not in ("F32", "F64", "BF16"):
            raise UserError(f"{path} holds {dtype} of shape {shape}, no image features; remove {path.parent}")

    def __len__(self) -> int:
        count: int = self._slices.get_shape()[0]
        return count

    def __getitem__(self, rows: int | slice, /) -> torch.Tensor:
        features: torch.Tensor = self._slices[rows]
        return features
