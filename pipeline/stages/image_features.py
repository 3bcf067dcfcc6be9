"""Image features of the frozen CLIP, computed once for all methods that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import TrainingConfig, values_affecting
from pipeline.methods.registry import training_config
from pipeline.runtime.progress import Reporter
from pipeline.runtime.stage import WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.plan import Plan
from pipeline.stages.training_spec import FEATURES, TrainingSpec, feature_inputs, training_config_values
from pipeline.training.batches import load_training_sets
from pipeline.training.frozen_features import frozen_test_features, frozen_training_features, save_features
from pipeline.training.trainer import num_steps_per_epoch

NAME = "image_features"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of one task's test set, or of the batches of all steps of a schedule; `work_item` computes them."""

    artifact: Artifact
    work_item: WorkItem


def test_features(plan: Plan, task: str) -> ImageFeatures:
    config = values_affecting(plan.config, "test_features")
    artifact = plan.artifact(NAME, {**feature_inputs(plan), "task": task, "split": "test", "config": config})
    return _features(plan, artifact, f"image features: {task}", _encode_test_images, task)


def training_features(plan: Plan, task: str, method: str) -> ImageFeatures:
    """Plan features for the largest number of steps of a training with this task; shorter trainings use a prefix."""
    training = training_config(method, plan.config)
    counts = plan.split_description.counts["train"]
    num_steps = training.epochs * num_steps_per_epoch([counts[name] for name in plan.tasks], training.batch_size)
    config = training_config_values(plan.config, method, [task], "training_features")
    artifact = plan.artifact(NAME, {**feature_inputs(plan), "task": task, "split": "train", "config": config})
    label = f"image features: {task}, {num_steps} steps of {training.batch_size}"
    return _features(plan, artifact, label, _encode_training_images, task, num_steps, training)


def _features(
    plan: Plan, artifact: Artifact, label: str, encode: Callable[..., torch.Tensor], task: str, *arguments: Any
) -> ImageFeatures:
    spec = TrainingSpec(plan.config, plan.splits, (task,), label)
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
    return frozen_test_features(
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
    (training_set,) = load_training_sets(
        spec.reader(),
        spec.tasks,
        towers.preprocessing,
        training.augmentation.random_crop,
        towers.device,
        config.cluster.cpus_per_worker,
    )
    return frozen_training_features(
        towers,
        training_set,
        num_steps,
        training,
        config.seed,
        config.clip.precision,
        lambda count: reporter.update(count, num_steps, "steps"),
    )
