"""The affinity `features`: how similar the images of two tasks look to the frozen CLIP.

The centroid of a task is the mean over its classes of the mean over a class's training images of their features, each
image's scaled to unit length: all images of a class, and all classes, weigh equally, however many there are. An image
with several labels is one of each of its classes. The mean of the tasks' centroids, what all tasks have in common, is
subtracted. The affinity is the cosine of two tasks' results.

Without the subtraction all cosines are near one. With it they are relative to the average task, so they cannot all be
positive, and those of two tasks are -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def feature_affinity(features: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> np.ndarray:
    """Return the affinities (T, T); a task without a direction, such as a single one, has zeros.

    Args:
        features: for each of T tasks the frozen image features (N_j, E) of its training images.
        labels: their labels (N_j,); (N_j, C) of 0 and 1 if an image may have several.
    """
    centroids = np.stack([_centroid(*pair) for pair in zip(features, labels, strict=True)])
    centered = centroids - centroids.mean(axis=0)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    # Rounding leaves a direction to centroids that are equal.
    has_direction = length > 1e-12 * np.linalg.norm(centroids, axis=1, keepdims=True)
    unit = np.where(has_direction, centered / np.where(has_direction, length, 1.0), 0.0)
    gram = unit @ unit.T
    affinity: np.ndarray = (gram + gram.T) / 2
    return affinity


def resampled_feature_affinity(
    features: Sequence[np.ndarray], labels: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Return the affinities of a bootstrap resample of each task's images; a class that it lacks does not count."""
    drawn = [rng.integers(0, len(task_labels), len(task_labels)) for task_labels in labels]
    return feature_affinity(
        [values[images] for values, images in zip(features, drawn, strict=True)],
        [values[images] for values, images in zip(labels, drawn, strict=True)],
    )


def _centroid(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(length == 0, 1.0, length)
    if labels.ndim == 1:
        num_classes = len(np.unique(labels))
        weights = 1.0 / np.bincount(labels)[labels]  # of an image in the mean of its class
    else:
        counts = labels.sum(axis=0)
        num_classes = int(np.count_nonzero(counts))
        weights = labels[:, counts > 0] @ (1.0 / counts[counts > 0])
    centroid: np.ndarray = weights @ unit / num_classes
    return centroid
