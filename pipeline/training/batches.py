"""Few-shot training sets in memory and the order in which a training sees them.

A batch is a pure function of (seed, task, step): nothing needs to be saved to go on with a training exactly, and a
task gets the same batches whatever group it is trained in.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from pipeline.config import AugmentationConfig
from pipeline.data.augment import augment
from pipeline.data.images import training_pixels
from pipeline.data.parquet import SplitReader
from pipeline.seeds import derive_seed


class Features(Protocol):
    """Image features as a tensor, or in a file of which only the rows asked for are read."""

    def __getitem__(self, rows: int | slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class TrainingSet:
    """A task's training images, decoded once, or what the frozen CLIP makes of them, or both.

    `images`: uint8 (3, h_i, w_i) each, or none; `labels`: int64 (n,).
    """

    task: str
    images: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    frozen_features: Features | None = None
    """(steps, B, E), indexed by step: what the frozen image tower makes of each step's batch."""

    def batch(
        self,
        step: int,
        batch_size: int,
        image_size: int,
        augmentation: AugmentationConfig,
        seed: int,
        part: slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented pixels (B, 3, image_size, image_size) in [0, 255] and labels of a `part` of a step's batch."""
        chosen = self._chosen(step, batch_size, seed)
        generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", self.task, str(step)))
        pixels = augment([self.images[i] for i in chosen], image_size, augmentation, generator, part)
        return pixels, self.labels[chosen[part]]

    def frozen_batch(
        self, step: int, batch_size: int, seed: int, part: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen features (B, E) and labels of a `part` of a step's batch."""
        assert self.frozen_features is not None
        chosen = self._chosen(step, batch_size, seed)
        return self.frozen_features[step][part].to(self.labels.device), self.labels[chosen[part]]

    def _chosen(self, step: int, batch_size: int, seed: int) -> list[int]:
        return batch_indices(len(self.labels), batch_size, step, derive_seed(seed, "order", self.task))


def batch_indices(num_images: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of a step's images: consecutive pieces of an endless row of shuffles, each image equally often."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_shuffle(num_images, position // num_images, seed)[position % num_images] for position in positions]


@lru_cache(maxsize=1024)
def _shuffle(num_images: int, number: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "shuffle", str(number)))
    return torch.randperm(num_images, generator=generator).tolist()


def load_training_sets(
    reader: SplitReader, tasks: Sequence[str], image_size: int, device: torch.device, threads: int
) -> list[TrainingSet]:
    """Decodes the tasks' training images once, on `threads` threads, and moves them to the device."""
    sets = []
    with ThreadPoolExecutor(threads) as pool:
        for task in tasks:
            rows = list(reader.rows("train", task))
            pixels = pool.map(lambda row: training_pixels(row["image"], image_size), rows)
            images = tuple(torch.from_numpy(image).to(device) for image in pixels)
            labels = torch.tensor([row["label"] for row in rows], device=device)
            sets.append(TrainingSet(task, images, labels))
    return sets


def load_training_labels(reader: SplitReader, tasks: Sequence[str], device: torch.device) -> list[TrainingSet]:
    """The tasks' training sets without their images, for methods that need only frozen features of them."""
    sets = []
    for task in tasks:
        labels = [row["label"] for row in reader.rows("train", task, ("label",))]
        sets.append(TrainingSet(task, (), torch.tensor(labels, device=device)))
    return sets
