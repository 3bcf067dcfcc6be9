"""Few-shot training sets in memory, and the order of their batches.

A batch is a pure function of (seed, tasks of its set, step), so that resuming needs no saved data state, and a task
with a set of its own gets the same batches in every group.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from pipeline.config import AugmentationConfig
from pipeline.data.augment import augment
from pipeline.data.images import training_pixels
from pipeline.data.parquet import SplitReader
from pipeline.data.preprocessing import Preprocessing
from pipeline.seeds import derive_seed
from pipeline.training.multi_label import label_tensor


class Features(Protocol):
    """Image features as a tensor, or in a file of which only the indexed rows are read."""

    def __getitem__(self, rows: int | slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class TrainingSet:
    """Training images of one task or of several, decoded once, or their features by the frozen CLIP, or both.

    A batch of several tasks is mixed: it is drawn from all images alike, then ordered task by task.
    """

    tasks: tuple[str, ...]
    images: tuple[torch.Tensor, ...]
    """uint8 (3, h_i, w_i) each, task by task, or none."""
    labels: tuple[torch.Tensor, ...]
    """int64 (n,) of each task's images; float32 (n, C), 0 or 1, where they may have several."""
    frozen_features: Features | None = None
    """(steps, B, E): features of each step's batch by the frozen image tower."""

    @staticmethod
    def union(sets: Sequence[TrainingSet]) -> TrainingSet:
        """Return a set of the images of all tasks, without frozen features, which belong to the batches of one set."""
        tasks, images, labels = (
            tuple(item for part in parts for item in part)
            for parts in zip(*((task_set.tasks, task_set.images, task_set.labels) for task_set in sets))
        )
        return TrainingSet(tasks, images, labels)

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.labels))

    def batch(
        self,
        step: int,
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: AugmentationConfig,
        seed: int,
        shard: slice = slice(None),
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return pixels (B, 3, S, S) in [0, 255] and each task's labels of a `shard` of the step's batch; a task may
        have none."""
        indices = self._indices(step, batch_size, seed)
        generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", *self.tasks, str(step)))
        pixels = augment([self.images[i] for i in indices], preprocessing, augmentation, generator, shard)
        return pixels, self._labels(indices[shard])

    def frozen_batch(
        self, step: int, batch_size: int, seed: int, shard: slice = slice(None)
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return frozen features (B, E) and each task's labels of a `shard` of a step's batch."""
        assert self.frozen_features is not None
        indices = self._indices(step, batch_size, seed)
        return self.frozen_features[step][shard].to(self.labels[0].device), self._labels(indices[shard])

    def frozen_views(self, num_views: int, batch_size: int, seed: int) -> tuple[torch.Tensor, ...]:
        """Return frozen features (n, num_views, E) of each task's images, of their first augmented views: those of the
        first `num_views` epochs of batches."""
        assert self.frozen_features is not None
        views: list[list[torch.Tensor]] = [[] for _ in range(len(self))]
        for step in range(math.ceil(num_views * len(self) / batch_size)):
            for index, features in zip(self._indices(step, batch_size, seed), self.frozen_features[step]):
                views[index].append(features)
        stacked = torch.stack([torch.stack(features[:num_views]) for features in views]).to(self.labels[0].device)
        by_task: tuple[torch.Tensor, ...] = stacked.split([len(labels) for labels in self.labels])
        return by_task

    @property
    def _bounds(self) -> list[int]:
        """Index of each task's first image, and the number of images."""
        return list(accumulate(map(len, self.labels), initial=0))

    def _indices(self, step: int, batch_size: int, seed: int) -> list[int]:
        """Return the indices of a step's images, ordered by task."""
        indices = batch_indices(len(self), batch_size, step, derive_seed(seed, "order", *self.tasks))
        bounds = self._bounds
        return sorted(indices, key=lambda index: bisect(bounds, index))

    def _labels(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        ranges = pairwise(self._bounds)
        return tuple(
            labels[[index - start for index in indices if start <= index < stop]]
            for labels, (start, stop) in zip(self.labels, ranges)
        )


def batch_indices(num_images: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the indices of a step's images: consecutive chunks of an endless sequence of shuffles."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_shuffle(num_images, position // num_images, seed)[position % num_images] for position in positions]


@lru_cache(maxsize=1024)
def _shuffle(num_images: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "shuffle", str(epoch)))
    return torch.randperm(num_images, generator=generator).tolist()


def load_training_sets(
    reader: SplitReader,
    tasks: Sequence[str],
    preprocessing: Preprocessing,
    random_crop: bool,
    device: torch.device,
    threads: int,
) -> list[TrainingSet]:
    """Decode the tasks' training images on `threads` threads, and move them to the device: a set for each task.

    Args:
        random_crop: as in `training_pixels`, that of the augmentation of their batches.
    """
    sets = []
    with ThreadPoolExecutor(threads) as pool:
        for task in tasks:
            rows = list(reader.rows("train", task))
            pixels = pool.map(lambda row: training_pixels(row["image"], preprocessing, random_crop), rows)
            images = tuple(torch.from_numpy(image).to(device) for image in pixels)
            sets.append(TrainingSet((task,), images, (_label_tensor(reader, task, rows).to(device),)))
    return sets


def load_training_labels(reader: SplitReader, tasks: Sequence[str], device: torch.device) -> list[TrainingSet]:
    """Load the tasks' training sets without images, for methods that need only frozen features."""
    sets = []
    for task in tasks:
        rows = list(reader.rows("train", task, ("label",)))
        sets.append(TrainingSet((task,), (), (_label_tensor(reader, task, rows).to(device),)))
    return sets


def _label_tensor(reader: SplitReader, task: str, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    return label_tensor([row["label"] for row in rows], len(reader.description.classes[task]))
