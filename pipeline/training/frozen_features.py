"""Image features of the frozen CLIP, computed once for all methods that do not modify the image tower or are
regularized towards it.

A step's batch and its augmentation are functions of seed, tasks and step, so all trainings of the same tasks with the
same schedule see the same images and share the features of every step, like those of the test set.
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
from pipeline.data.parquet import Split, SplitReader
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
    """Return features (steps, B, E) of the batches of `num_steps` steps; `on_steps` is called with the steps done."""
    features = []
    steps_per_batch = max(1, BATCH_SIZE // config.batch_size)
    for start in range(0, num_steps, steps_per_batch):
        steps = range(start, min(start + steps_per_batch, num_steps))
        pixels = [
            training_set.batch(step, config.batch_size, towers.preprocessing, config.augmentation, seed)[0]
            for step in steps
        ]
        with autocast(towers, precision):
            x = towers.encode_image(towers.normalize_pixels(torch.cat(pixels)))
        features.append(x.unflatten(0, (len(steps), config.batch_size)).cpu())
        on_steps(steps.stop)
    return torch.cat(features)


@torch.no_grad()
def frozen_split_features(
    towers: ClipTowers,
    reader: SplitReader,
    task: str,
    threads: int,
    precision: str,
    on_images: Callable[[int], None] = lambda count: None,
    split: Split = "test",
) -> torch.Tensor:
    """Return features (N, E) of a task's images of a split, in stored order: of training images as training computes
    them, of test images as evaluation does. `on_images` is called with the images done."""
    features, num_done = [], 0
    pinned = towers.device.type == "cuda"
    for _, rows, pixels in decoded_batches(reader, [task], towers.preprocessing, threads, pinned=pinned, split=split):
        with autocast(towers, precision, inference=split == "test"):
            images = towers.normalize_pixels(pixels.to(towers.device, non_blocking=pinned))
            features.append(towers.encode_image(images).cpu())
        on_images(num_done := num_done + len(rows))
    return torch.cat(features)


def save_features(path: Path, features: torch.Tensor) -> None:
    save_file({_NAME: features.contiguous()}, path)


class StoredFeatures:
    """Features in a file, of which only the indexed rows are read.

    Raises:
        UserError: the file is missing, damaged, or not of image features.
    """

    def __init__(self, path: Path):
        try:
            self._slices = safe_open(path, "pt").get_slice(_NAME)
            shape, dtype = self._slices.get_shape(), self._slices.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as image features ({error}): remove {path.parent}") from None
        if len(shape) not in (2, 3) or dtype not in ("F32", "F64", "BF16"):
            raise UserError(f"{path} has {dtype} of shape {shape}, not image features: remove {path.parent}")

    def __len__(self) -> int:
        count: int = self._slices.get_shape()[0]
        return count

    def __getitem__(self, rows: int | slice, /) -> torch.Tensor:
        features: torch.Tensor = self._slices[rows]
        return features
