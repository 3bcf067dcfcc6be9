"""A trial on a worker of Ray Tune: the stages from the global prompt to the group trainings at one point of a search,
measured on the validation images after every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ray import tune

from pipeline.config import content_hash
from pipeline.data.parquet import SplitReader
from pipeline.errors import UserError
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import MmapShape
from pipeline.methods.registry import VARIANTS, get_method, training_config
from pipeline.runtime.stage import WorkItem
from pipeline.stages.global_prompt import global_prompt_work_item
from pipeline.stages.group_trainings import Training, build_method, plan_trainings
from pipeline.stages.grouping import compute_grouping, grouping_artifact, read_grouping
from pipeline.stages.plan import Plan
from pipeline.stages.training_spec import TrainingSpec
from pipeline.training.batches import TrainingSet, load_training_labels, load_training_sets
from pipeline.training.evaluate import accuracy, decoded_batches, evaluate_decoded
from pipeline.tuning.search_file import config_at

METRIC, EPOCH, WHOLE, ACCURACY = "validation_accuracy", "epoch", "whole", "accuracy"
PARAMETERS, FAULT = "trained_parameters", "fault"
"""Names of what a trial reports: the mean over tasks (0 to 1), epochs done, whether these are all, task → accuracy,
trained numbers, and, once and last, what ended it."""


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of a search share, as it is sent to their workers."""

    plan: Plan
    """Of the search, without its images. The splits' test images are the validation images."""
    methods: tuple[str, ...]
    checkpoints: Path
    """Folder in the storage, of which each point has a part: what is known of a trial's number may be lost."""


def run_trial(config: dict[str, Any], setup: TrialSetup) -> None:
    """Reports to Tune after every epoch. A fault that its values make, such as a loss that is not finite, ends the
    trial and no other, with an accuracy of 0."""
    point, epoch = config["trial"]["point"], 0
    try:
        for measured in measured_epochs(point, setup, setup.checkpoints / content_hash(point)):
            epoch = measured[EPOCH]
            tune.report(measured)
    except UserError as error:
        tune.report({EPOCH: epoch, METRIC: 0.0, FAULT: str(error)})


def measured_epochs(point: dict[str, Any], setup: TrialSetup, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Trains at a point, all groups epoch by epoch together; what is reported after each epoch. From the newest
    checkpoints, if the trial began before.

    Raises:
        UserError: as the pipeline's stages.
    """
    plan, method = _plan(point, setup)
    grouping = _grouping(plan) if VARIANTS[method].uses_grouping else None
    trainings = plan_trainings(plan, method, grouping, {})
    for training in trainings:
        for features in training.features:
            _make(features.work_item)
        if training.init_from:
            for features in training.init_from.features:
                _make(features.work_item)
            _make(training.init_from.work_item)
    groups = [_GroupTraining(training, checkpoints / str(number)) for number, training in enumerate(trainings)]
    parameters = sum(group.num_parameters for group in groups)
    begun, epochs = max(1, *(group.trainer.epoch for group in groups)), groups[0].trainer.epochs
    for epoch in range(begun, epochs + 1):
        for group in groups:
            while group.trainer.epoch < epoch:  # its checkpoint may be older than another group's
                group.trainer.run_epoch()
        of_task = {task: value for group in groups for task, value in group.validation_accuracy().items()}
        of_task = {task: of_task[task] for task in plan.tasks}
        yield {
            EPOCH: epoch,
            WHOLE: epoch == epochs,
            METRIC: sum(of_task.values()) / len(of_task),
            ACCURACY: of_task,
            PARAMETERS: parameters,
        }


class _GroupTraining:
    """One group's trainer, and its method on the validation images."""

    def __init__(self, training: Training, checkpoints: Path):
        work = training.spec
        self._work, self._kind = work, get_method(work.method)
        self._towers = work.towers(self._kind.trains_weights)
        start = training.init_from.artifact if training.init_from else None
        self._method = build_method(work, self._towers, start, training.affinities)
        self.num_parameters = sum(parameter.numel() for parameter in self._method.parameters())
        sets = work.with_frozen_features([self._training_set(task) for task in work.tasks])
        epochs = training_config(work.method, work.config).epochs
        storage = training.artifact.storage
        self.trainer = work.trainer(self._towers, self._method, epochs, sets, checkpoints, storage)

    def validation_accuracy(self) -> dict[str, float]:
        """Task → 0 to 1."""
        work, config = self._work, self._work.config
        with torch.no_grad():
            groups = [(work.class_names(), self._method())]
            templates = self._kind.templates_by_task(config, work.tasks)
            classifier = Classifier(self._towers, templates, groups, config.clip.precision)
        if work.test_features:
            return accuracy(work.predictions(classifier, lambda count: None))
        size, threads = self._towers.image_size, config.cluster.cpus_per_worker
        folder = work.splits.download()
        batches = (batch for task in work.tasks for batch in _validation_batches(folder, task, size, threads))
        return accuracy(evaluate_decoded(classifier, batches))

    def _training_set(self, task: str) -> TrainingSet:
        size, threads = self._towers.image_size, self._work.config.cluster.cpus_per_worker
        folder = self._work.splits.download()
        return _training_set(folder, task, size, self._towers.device, threads, self._kind.modifies_image_encoder)


@cache  # one search's few-shot images; a worker goes from trial to trial
def _training_set(
    folder: Path, task: str, image_size: int, device: torch.device, threads: int, images: bool
) -> TrainingSet:
    reader = SplitReader(folder)
    if not images:
        return load_training_labels(reader, [task], device)[0]
    return load_training_sets(reader, [task], image_size, device, threads)[0]


@cache  # likewise
def _validation_batches(folder: Path, task: str, image_size: int, threads: int) -> tuple[Any, ...]:
    return tuple(decoded_batches(SplitReader(folder), [task], image_size, threads))


def _plan(point: dict[str, Any], setup: TrialSetup) -> tuple[Plan, str]:
    """Of a point, and the point's method."""
    base = setup.plan
    config, method = config_at(base.config, point, setup.methods)
    shots = base.split_description.shots
    config = config.model_copy(update={"data": config.data.model_copy(update={"shots": shots})})
    shape = MmapShape.of(config.mmap, TrainingSpec(config, base.splits, (), "trial").towers())
    return replace(base, config=config, mmap_shape=shape), method


def _grouping(plan: Plan) -> dict[str, Any]:
    """grouping.json of the run's global prompt, trained without the validation images; found if another trial made
    it."""
    global_prompt = global_prompt_work_item(plan)
    _make(global_prompt)
    assert global_prompt.artifact is not None  # as _make checks
    artifact = grouping_artifact(plan, global_prompt.artifact)
    compute_grouping(plan, global_prompt.artifact, artifact)
    return read_grouping(artifact)


def _make(work: WorkItem) -> None:
    """In this process, unless it was made before."""
    progress = SimpleNamespace(post=lambda report: None)
    assert work.artifact is not None  # a trial's work makes one
    if not work.artifact.is_complete():
        work.function(*work.arguments, progress)
