"""A trial on a worker of Ray Tune: the stages from the global prompt to the group trainings with a trial's params,
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
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.grouping.affinities import Gradient
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import MmapShape
from pipeline.methods.registry import VARIANTS, get_method, training_config
from pipeline.runtime.stage import WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.global_prompt import global_prompt_work_item
from pipeline.stages.group_trainings import Training, build_method, plan_trainings
from pipeline.stages.grouping import compute_grouping, gradient_affinity, grouping_artifact, read_grouping
from pipeline.stages.grouping_sources import GroupingSources
from pipeline.stages.plan import Plan
from pipeline.stages.single_tasks import loss_work_items, single_task_trainings, single_tasks
from pipeline.stages.training_spec import TrainingSpec
from pipeline.training.batches import TrainingSet, load_training_labels, load_training_sets
from pipeline.training.evaluate import accuracy, decoded_batches, evaluate_decoded
from pipeline.tuning.search_file import trial_config

METRIC, EPOCH, COMPLETED, ACCURACY = "validation_accuracy", "epoch", "completed", "accuracy"
PARAMETERS, ERROR = "trained_parameters", "error"
"""Keys of a trial's reports: mean accuracy over tasks (0 to 1), epochs so far, whether these are all, task → accuracy,
number of trained parameters, and, in the last report of a failed trial, its error."""


@dataclass(frozen=True)
class TrialSetup:
    """Setup shared by all trials of a search, sent to their workers."""

    plan: Plan
    """Plan of the search, without its images. The splits' test images are the validation images."""
    methods: tuple[str, ...]
    checkpoints: Path
    """Folder in the storage with a subfolder per params, not per trial: trial numbers may be lost on a crash."""


def run_trial(config: dict[str, Any], setup: TrialSetup) -> None:
    """Report to Tune after every epoch. An error caused by the params, such as a non-finite loss, ends only this trial,
    with an accuracy of 0."""
    params, epoch = config["trial"]["params"], 0
    try:
        for report in train_epochs(params, setup, setup.checkpoints / content_hash(params)):
            epoch = report[EPOCH]
            tune.report(report)
    except UserError as error:
        tune.report({EPOCH: epoch, METRIC: 0.0, ERROR: str(error)})


def train_epochs(params: dict[str, Any], setup: TrialSetup, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Train all groups of a trial in lockstep, epoch by epoch, and yield the report after each. Resumes from the newest
    checkpoints, if any.

    Raises:
        UserError: as the pipeline's stages.
    """
    plan, method = _trial_plan(params, setup)
    grouping = _grouping(plan) if VARIANTS[method].uses_grouping else None
    affinities = gradient_affinity(plan, _global_prompt(plan)) if VARIANTS[method].uses_gradients else None
    trainings = plan_trainings(plan, method, grouping, {}, affinities)
    for training in trainings:
        for features in training.features:
            _run_unless_finished(features.work_item)
        for source in training.init_from:
            for features in source.features:
                _run_unless_finished(features.work_item)
            _run_unless_finished(source.work_item)
    groups = [_GroupTraining(training, checkpoints / str(number)) for number, training in enumerate(trainings)]
    num_parameters = sum(group.num_parameters for group in groups)
    # A method that takes no steps has 0 epochs, and is measured once.
    first_epoch, epochs = max(1, *(group.trainer.epoch for group in groups)), groups[0].trainer.epochs
    for epoch in range(first_epoch, max(epochs, 1) + 1):
        for group in groups:
            while group.trainer.epoch < min(epoch, epochs):  # its checkpoint may be older than another group's
                group.trainer.run_epoch()
        by_task = {task: value for group in groups for task, value in group.validation_accuracy().items()}
        accuracies = {task: by_task[task] for task in plan.tasks}
        yield {
            EPOCH: epoch,
            COMPLETED: epoch >= epochs,
            METRIC: sum(accuracies.values()) / len(accuracies),
            ACCURACY: accuracies,
            PARAMETERS: num_parameters,
        }


class _GroupTraining:
    """Trainer of one group, with its method's accuracy on the validation images."""

    def __init__(self, training: Training, checkpoints: Path):
        spec = training.spec
        self._spec, self._method_class = spec, get_method(spec.method)
        self._towers = spec.towers(self._method_class.trains_weights)
        init_from = [source.artifact for source in training.init_from]
        self._method = build_method(spec, self._towers, init_from, training.affinities)
        sets = [self._training_set(task) for task in spec.tasks]
        epochs = training_config(spec.method, spec.config).epochs
        storage = training.artifact.storage
        self.trainer = spec.trainer(self._towers, self._method, epochs, sets, checkpoints, storage)
        self.num_parameters = sum(parameter.numel() for parameter in self.trainer.parameters)

    def validation_accuracy(self) -> dict[str, float]:
        """Return the accuracy of each task, 0 to 1."""
        spec, config = self._spec, self._spec.config
        with torch.no_grad():
            tokens = self._method_class.tokenize(config, self._towers.tokenizer, spec.class_names())
            classifier = Classifier(self._towers, [(spec.tasks, tokens, self._method())], config.clip.precision)
        if spec.test_features:
            return accuracy(spec.predictions(classifier, lambda count: None))
        preprocessing, threads = self._towers.preprocessing, config.cluster.cpus_per_worker
        folder = spec.splits.download("splits.json")
        batches = (batch for task in spec.tasks for batch in _validation_batches(folder, task, preprocessing, threads))
        return accuracy(evaluate_decoded(classifier, batches))

    def _training_set(self, task: str) -> TrainingSet:
        config, towers = self._spec.config, self._towers
        folder, threads = self._spec.splits.download("splits.json"), config.cluster.cpus_per_worker
        if not self._method_class.modifies_image_encoder:
            return _training_labels(folder, task, towers.device)
        random_crop = training_config(self._spec.method, config).augmentation.random_crop
        return _training_set(folder, task, towers.preprocessing, random_crop, towers.device, threads)


@cache  # shared by the trials that a worker runs
def _training_set(
    folder: Path, task: str, preprocessing: Preprocessing, random_crop: bool, device: torch.device, threads: int
) -> TrainingSet:
    return load_training_sets(SplitReader(folder), [task], preprocessing, random_crop, device, threads)[0]


@cache
def _training_labels(folder: Path, task: str, device: torch.device) -> TrainingSet:
    return load_training_labels(SplitReader(folder), [task], device)[0]


@cache
def _validation_batches(folder: Path, task: str, preprocessing: Preprocessing, threads: int) -> tuple[Any, ...]:
    return tuple(decoded_batches(SplitReader(folder), [task], preprocessing, threads))


def _trial_plan(params: dict[str, Any], setup: TrialSetup) -> tuple[Plan, str]:
    """Return a trial's plan and method."""
    base = setup.plan
    config, method = trial_config(base.config, params, setup.methods)
    shots = base.split_description.shots
    config = config.model_copy(update={"data": config.data.model_copy(update={"shots": shots})})
    shape = MmapShape.of(config.mmap, TrainingSpec(config, base.splits, (), "trial").towers())
    return replace(base, config=config, mmap_shape=shape), method


def _grouping(plan: Plan) -> dict[str, Any]:
    """Return grouping.json of the affinity that decides, measured without the validation images, or reuse another
    trial's."""
    plan = replace(plan, affinities=(plan.config.grouping.affinity,))
    if Gradient.name in plan.affinities:
        sources = GroupingSources.of(_global_prompt(plan), None)
    else:
        trainings = single_task_trainings(plan)
        losses = loss_work_items(plan, trainings)
        for work in (*(training.work_item for training in trainings), *losses):
            _run_unless_finished(work)
        sources = GroupingSources.of(None, single_tasks(plan, trainings, losses))
    artifact = grouping_artifact(plan, sources)
    compute_grouping(plan, sources, artifact)
    return read_grouping(artifact)


def _global_prompt(plan: Plan) -> Artifact:
    """Return the global prompt, trained without the validation images, or reuse another trial's."""
    work = global_prompt_work_item(plan)
    _run_unless_finished(work)
    assert work.artifact is not None  # checked above
    return work.artifact


def _run_unless_finished(work: WorkItem) -> None:
    """Run work in this process, unless its artifact exists."""
    progress = SimpleNamespace(post=lambda report: None)
    assert work.artifact is not None  # all work of a trial has one
    if not work.artifact.is_complete():
        work.function(*work.arguments, progress)
