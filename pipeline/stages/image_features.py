"""Image features of the frozen CLIP, computed once for all methods that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import TrainingConfig, values_affecting
from pipeline.grouping.text import format_groups
from pipeline.methods.registry import get_method, training_config
from pipeline.runtime.progress import Reporter
from pipeline.runtime.stage import WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.plan import Plan
from pipeline.stages.training_spec import FEATURES, TrainingSpec, feature_inputs, training_config_values
from pipeline.training.batches import TrainingSet, load_training_sets
from pipeline.training.frozen_features import frozen_split_features, frozen_training_features, save_features
from pipeline.training.trainer import num_steps_per_epoch

NAME = "image_features"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a task's test set, or of a training set's batches in all steps of a schedule; `work_item` computes
    them."""

    artifact: Artifact
    work_item: WorkItem


def test_features(plan: Plan, task: str) -> ImageFeatures:
    config = values_affecting(plan.config, "test_features")
    artifact = plan.artifact(NAME, {**feature_inputs(plan), "task": task, "split": "test", "config": config})
    return _features(plan, artifact, f"image features: {task}", _encode_test_images, [task])


def training_features(plan: Plan, tasks: Sequence[str], method: str) -> dict[tuple[str, ...], ImageFeatures]:
    """Plan features for each training set (by its tasks) of a training of `tasks`."""
    training, counts = training_config(method, plan.config), plan.split_description.counts["train"]
    kind = get_method(method)
    sizes = {set_tasks: sum(counts[task] for task in set_tasks) for set_tasks in kind.tasks_per_set(tasks)}
    epochs = max(training.epochs, kind.num_views(plan.config))
    num_steps = epochs * num_steps_per_epoch(sizes.values(), training.batch_size)
    features = {}
    for set_tasks in sizes:
        config = training_config_values(plan.config, method, set_tasks, "training_features")
        inputs = {"tasks": list(set_tasks), "split": "train", "steps": num_steps, "config": config}
        label = f"image features: {format_groups([set_tasks])}, {num_steps} steps of {training.batch_size}"
        artifact = plan.artifact(NAME, {**feature_inputs(plan), **inputs})
        features[set_tasks] = _features(plan, artifact, label, _encode_training_images, set_tasks, num_steps, training)
    return features


def _features(
    plan: Plan,
    artifact: Artifact,
    label: str,
    encode: Callable[..., torch.Tensor],
    tasks: Sequence[str],
    *arguments: Any,
) -> ImageFeatures:
    spec = TrainingSpec(plan.config, plan.splits, tuple(tasks), label)
    return ImageFeatures(
        artifact, WorkItem(label, _write_features, (spec, artifact, encode, arguments), artifact, uses_gpu=True)
    )


def _write_features(
    spec: TrainingSpec, artifact: Artifact, encode: Callable[..., torch.Tensor], arguments: Sequence[Any], progress: Any
) -> None:
    with artifact.writer() as writer:
        save_features(writer.folder / FEATURES, encode(spec, Reporter(progress, spec.label), *arguments))


def _encode_test_images(spec: TrainingSpec, reporter: Reporter) -> torch.Tensor:
    (task,), reader, config = spec.tasks, spec.reader(), spec.config
    total = reader.description.counts["test"][task]
    return frozen_split_features(
        spec.towers(),
        reader,
        task,
        config.cluster.cpus_per_worker,
        config.clip.precision,
        lambda count: reporter.update(count, total, "test images"),
    )


def _encode_training_images(
    spec: TrainingSpec, reporter: Reporter, num_steps: int, training: TrainingConfig
) -> torch.Tensor:
    config, towers = spec.config, spec.towers()
    sets = load_training_sets(
        spec.reader(),
        spec.tasks,
        towers.preprocessing,
        training.augmentation.random_crop,
        towers.device,
        config.cluster.cpus_per_worker,
    )
    return frozen_training_features(
        towers,
        TrainingSet.union(sets),
        num_steps,
        training,
        config.seed,
        config.clip.precision,
        lambda count: reporter.update(count, num_steps, "steps"),
    )
