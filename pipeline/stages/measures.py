"""Affinities of tasks from stored artifacts, with what the stability of a grouping by them is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import GroupingConfig
from pipeline.errors import UserError
from pipeline.grouping.affinities import Features, Gradient, Transfer
from pipeline.grouping.affinity import affinity_matrix, snapshot_affinities
from pipeline.grouping.features import feature_affinity, resampled_feature_affinity
from pipeline.grouping.gradient_blocks import gradient_blocks, read_layout
from pipeline.grouping.stability import Resample, resample_snapshots
from pipeline.grouping.transfer import TransferLosses, transfer_affinity
from pipeline.runtime.storage import Artifact
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.grouping_sources import PROMPTS_OF, GroupingSources
from pipeline.stages.single_tasks import LOSSES
from pipeline.training.snapshots import read_gradients, read_steps
from pipeline.training.training_losses import read_losses


@dataclass(frozen=True)
class Measure:
    """Affinities of T tasks."""

    affinity: np.ndarray
    """(T, T)."""
    num_resampled: int
    """Number of what is resampled: snapshots, or training images."""
    resample: Resample
    gains: np.ndarray | None = None
    """(T, T): gains of the column's task from the prompts of the row's, of transfer."""
    steps: tuple[int, ...] = ()
    """Steps (S,) of the gradients' snapshots."""
    by_snapshot: np.ndarray | None = None
    """(S, T, T): affinities of each snapshot."""


def measure_gradients(tasks: Sequence[str], sources: GroupingSources, options: GroupingConfig) -> Measure:
    """Return the affinities of the gradients.

    Raises:
        UserError: a file is damaged, or its layout or steps differ from the first file's.
    """
    layout, steps, gradients = _read_snapshots(tasks, sources)
    blocks = gradient_blocks(layout, per_layer=options.per_layer, scaling_matrices=options.scaling_matrices)
    affinity = affinity_matrix(gradients, options.gradient_similarity, tasks=tasks, blocks=blocks)
    by_snapshot = snapshot_affinities(gradients, options.gradient_similarity, blocks)
    return Measure(affinity, len(steps), resample_snapshots(by_snapshot), steps=tuple(steps), by_snapshot=by_snapshot)


def measure_transfer(tasks: Sequence[str], sources: GroupingSources, options: GroupingConfig) -> Measure:
    """Return what tasks gain from each other's prompts. Raises: UserError: a file is damaged; a loss is not finite."""
    losses = {
        (artifact.inputs[PROMPTS_OF], task): stored.losses
        for artifact in sources.losses
        for task, stored in read_losses(artifact.download() / LOSSES).items()
    }
    zero_shot = {task: losses[None, task] for task in tasks}
    adapted = {(prompts_of, task): losses[prompts_of, task] for prompts_of in tasks for task in tasks}
    measured = TransferLosses.from_mappings(tasks, zero_shot, adapted)
    gains = measured.gains
    num_images = sum(map(len, measured.zero_shot))
    return Measure(transfer_affinity(gains), num_images, measured.resampled_affinity, gains=gains)


def measure_features(tasks: Sequence[str], sources: GroupingSources, options: GroupingConfig) -> Measure:
    """Return how similar the tasks' images look to the frozen CLIP. Raises: UserError: a file is damaged."""
    features: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for file in _zero_shot_files(sources.losses):
        for task, stored in read_losses(file).items():
            if stored.features is None:
                raise UserError(f"{file} has no image features: remove {file.parent} and run again")
            features[task], labels[task] = stored.features, stored.labels
    values = [features[task] for task in tasks], [labels[task] for task in tasks]
    num_images = sum(map(len, values[1]))
    return Measure(feature_affinity(*values), num_images, partial(resampled_feature_affinity, *values))


MEASURES: dict[str, Callable[[Sequence[str], GroupingSources, GroupingConfig], Measure]] = {
    Transfer.name: measure_transfer,
    Gradient.name: measure_gradients,
    Features.name: measure_features,
}
"""Affinity → its computation."""


def _zero_shot_files(losses: Sequence[Artifact]) -> list[Path]:
    return [artifact.download() / LOSSES for artifact in losses if artifact.inputs[PROMPTS_OF] is None]


def _read_snapshots(
    tasks: Sequence[str], sources: GroupingSources
) -> tuple[dict[str, list[int]], list[int], np.ndarray]:
    """Return layout, steps (S,), and gradients (S, T, P) of the tasks, in their order.

    Raises:
        UserError: a file is damaged, or its layout or steps differ from the first file's.
    """
    gradients_by_task: dict[str, np.ndarray] = {}
    layouts, steps, first_file = [], [], None
    for names, artifact in sources.snapshots.items():
        file = artifact.download() / SNAPSHOTS
        first_file = first_file or file
        layouts.append(read_layout(file))
        steps.append(read_steps(file))
        gradients_by_task |= zip(names, read_gradients(file, names).swapaxes(0, 1))
        if (layouts[-1], steps[-1]) != (layouts[0], steps[0]):
            raise UserError(f"{file} has other steps or layers than {first_file}; remove its folder and run again")
    return layouts[0], steps[0], np.stack([gradients_by_task[task] for task in tasks], axis=1)
