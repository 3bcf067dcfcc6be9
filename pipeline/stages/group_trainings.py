"""Stage 5: one training per group, in parallel (Eqs. 9-12), with baselines: all tasks in one group, other methods, and
zero-shot CLIP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Effect
from pipeline.files import read_json, write_json
from pipeline.grouping.text import format_groups
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, save_adapter
from pipeline.methods.classifier import Classifier
from pipeline.methods.hipro import HiPro
from pipeline.methods.merging import MergedMethod
from pipeline.methods.method import TaskScope
from pipeline.methods.mmap import GroupMmap
from pipeline.methods.registry import DEFAULT_VARIANTS, VARIANTS, get_method, training_config
from pipeline.report.metrics import ACCURACY, MAP, metric_of
from pipeline.report.scores import MultiLabelScores
from pipeline.runtime.progress import Reporter
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.seeds import derive_seed
from pipeline.stages.flow import stage_title
from pipeline.stages.grouping import gradient_affinity, read_grouping
from pipeline.stages.grouping_sources import SingleTasks
from pipeline.stages.image_features import ImageFeatures, test_features, training_features
from pipeline.stages.plan import Plan
from pipeline.stages.training_spec import HISTORY, TrainingSpec, track_history, training_inputs
from pipeline.training.distributed import DistributedShard
from pipeline.training.evaluate import (
    AnyPrediction,
    MultiLabelPrediction,
    Prediction,
    accuracy,
    mean_loss,
    write_predictions,
)

NAME = "group_trainings"
ADAPTER, PREDICTIONS = "adapter.safetensors", "predictions.parquet"


@dataclass(frozen=True)
class MethodArtifacts:
    """Results of one method: an artifact per group."""

    name: str
    groups: tuple[tuple[str, ...], ...]
    artifacts: tuple[Artifact, ...]

    def results(self) -> list[dict[str, Any]]:
        """Return each artifact's result.json: accuracy (task → 0-1), or with data.multi_label mAP and its
        standard_error; test_loss (task → nats), trained_parameters, seconds."""
        return [read_json(artifact.download() / "result.json") for artifact in self.artifacts]


@dataclass(frozen=True)
class Training:
    """Planned training and evaluation of one group."""

    variant: str
    spec: TrainingSpec
    artifact: Artifact
    features: tuple[ImageFeatures, ...]
    """Image features that it reads."""
    init_from: tuple[Training, ...]
    """Trainings from whose final states it starts, or is merged."""
    affinities: list[list[float]] | None
    """Affinities of the tasks' gradients, for a method that uses them."""
    frozen_group_prompt: TrainedAdapter | None = None
    """MmAP of a group whose group prompt is frozen: only task prompts are trained."""

    @property
    def depth(self) -> int:
        """Length of the chain of work that it depends on; features have depth 0."""
        return max((source.depth + 1 for source in self.init_from), default=int(bool(self.features)))

    @property
    def work_item(self) -> WorkItem:
        init_from = [source.artifact for source in self.init_from]
        workers, label = self.spec.config.cluster.workers_per_training, self.spec.label
        arguments = (self.spec, self.artifact, init_from, self.affinities, self.frozen_group_prompt)
        return WorkItem(label, _train_group, arguments, self.artifact, True, workers, label)


def train_groups(
    plan: Plan,
    session: Session,
    global_prompt: Artifact | None = None,
    single_tasks: SingleTasks | None = None,
    grouping: Artifact | None = None,
    names: Sequence[str] | None = None,
) -> list[MethodArtifacts]:
    """Train and evaluate some of registry.VARIANTS, the largest groups first, using cached artifacts.

    Args:
        global_prompt: required for variants with `uses_gradients`.
        single_tasks: trainings of an earlier stage.
        grouping: required for variants with `uses_grouping`.
        names: None: zero-shot CLIP, config.baselines, and registry.DEFAULT_VARIANTS.
    """
    names = tuple(names or ("zero_shot", *plan.config.baselines, *DEFAULT_VARIANTS))
    result = read_grouping(grouping) if grouping else None
    affinities = None
    if any(VARIANTS[name].uses_gradients for name in names):
        assert global_prompt is not None  # a run with such a variant trains it
        affinities = gradient_affinity(plan, global_prompt)
    planned: dict[str, list[Training]] = {}
    for name in names:
        plan_trainings(plan, name, result, planned, affinities)
    _train_planned(session, planned, single_tasks)
    return [_method_artifacts(name, planned[name]) for name in names]


def train_every_group(plan: Plan, session: Session) -> MethodArtifacts:
    """Train MmAP for every non-empty subset of the tasks: 2^T - 1 trainings."""
    tasks, name = tuple(plan.tasks), "every group"
    groups = [group for size in range(1, len(tasks) + 1) for group in combinations(tasks, size)]
    planned = {name: [_training(plan, name, "mmap", group, f"group: {format_groups([group])}") for group in groups]}
    _train_planned(session, planned)
    return _method_artifacts(name, planned[name])


def train_added_task(plan: Plan, session: Session, frozen_group_prompt: TrainedAdapter | None) -> list[MethodArtifacts]:
    """Train MmAP for the only task of the run, beside zero-shot CLIP; its group prompt too unless `frozen_group_prompt`
    is given."""
    (task,) = plan.tasks
    planned: dict[str, list[Training]] = {}
    plan_trainings(plan, "zero_shot", None, planned)
    planned["grouped"] = [
        _training(plan, "grouped", "mmap", (task,), f"task: {task}", frozen_group_prompt=frozen_group_prompt)
    ]
    _train_planned(session, planned)
    return [_method_artifacts(name, trainings) for name, trainings in planned.items()]


def _train_planned(
    session: Session, planned: Mapping[str, Sequence[Training]], single_tasks: SingleTasks | None = None
) -> None:
    finished = {artifact.key for artifact in single_tasks.adapters.values()} if single_tasks else set()
    trainings: dict[str, Training] = {}
    for training in chain.from_iterable(planned.values()):
        if training.artifact.key not in finished:
            trainings.setdefault(training.artifact.key, training)  # variants may have groups in common
    with Stage(session, NAME, stage_title(NAME)) as stage:
        execute_trainings(session, stage, list(trainings.values()))


def execute_trainings(session: Session, stage: Stage, trainings: Sequence[Training]) -> None:
    """Run trainings in a stage, the largest groups first, each with an MLflow run below the stage's."""
    for training in trainings:
        tags = {"level": "training", "method": training.variant, "tasks": ", ".join(training.spec.tasks)}
        session.tracker.start_run(training.spec.label, parent=stage.name, tags=tags)
    features = {features.artifact.key: features.work_item for training in trainings for features in training.features}
    for depth in range(max((training.depth for training in trainings), default=-1) + 1):
        runnable = [training for training in trainings if training.depth == depth]
        runnable.sort(key=lambda training: -len(training.spec.tasks))
        stage.execute([*(features.values() if depth == 0 else ()), *(training.work_item for training in runnable)])
    for training in trainings:
        _track(session, training)


def _method_artifacts(name: str, trainings: Sequence[Training]) -> MethodArtifacts:
    groups, artifacts = zip(*((training.spec.tasks, training.artifact) for training in trainings))
    return MethodArtifacts(name, groups, artifacts)


def plan_trainings(
    plan: Plan,
    name: str,
    grouping: dict[str, Any] | None,
    planned: dict[str, list[Training]],
    affinities: list[list[float]] | None = None,
) -> list[Training]:
    """Add a variant's trainings to `planned`, and those of the variant that it starts from.

    Args:
        grouping: as in grouping.json; required for variants with `uses_grouping`.
        affinities: of the tasks' gradients; required for variants with `uses_gradients`.
    """
    if name in planned:
        return planned[name]
    variant = VARIANTS[name]
    init_candidates = plan_trainings(plan, variant.init_from, grouping, planned) if variant.init_from else []
    assert affinities is not None or not variant.uses_gradients
    groups = _groups(plan, variant.scope, grouping)
    planned[name] = []
    for tasks in groups:
        label = name.replace("_", " ")
        if name == "grouped" or len(groups) > 1:
            label = f"{'group' if name == 'grouped' else label}: {format_groups([tasks])}"
        init_from = tuple(training for training in init_candidates if set(tasks) & set(training.spec.tasks))
        used_affinities = affinities if variant.uses_gradients else None
        planned[name].append(_training(plan, name, variant.method, tasks, label, init_from, used_affinities))
    return planned[name]


def _training(
    plan: Plan,
    variant: str,
    method: str,
    tasks: tuple[str, ...],
    label: str,
    init_from: tuple[Training, ...] = (),
    affinities: list[list[float]] | None = None,
    frozen_group_prompt: TrainedAdapter | None = None,
) -> Training:
    kind = get_method(method)
    effects: tuple[Effect, ...] = ("training", "evaluation") if kind.trainable else ("evaluation",)
    inputs = {
        **training_inputs(plan, method, tasks, *effects),
        "group": list(tasks),
        "start": [source.artifact.key for source in init_from],
        "affinities": affinities,
        "joins": frozen_group_prompt.digest if frozen_group_prompt else None,
    }
    training: dict[tuple[str, ...], ImageFeatures] = {}
    test: dict[str, ImageFeatures] = {}
    if kind.trainable and (kind.uses_consistency or not kind.modifies_image_encoder):
        training = training_features(plan, tasks, method)
    if not kind.modifies_image_encoder:
        test = {task: test_features(plan, task) for task in tasks}
    spec = TrainingSpec(
        plan.config,
        plan.splits,
        tasks,
        label,
        method,
        {set_tasks: part.artifact for set_tasks, part in training.items()},
        {task: part.artifact for task, part in test.items()},
    )
    features = (*training.values(), *test.values())
    return Training(variant, spec, plan.artifact(NAME, inputs), features, init_from, affinities, frozen_group_prompt)


def _groups(plan: Plan, kind: TaskScope, grouping: dict[str, Any] | None) -> Sequence[tuple[str, ...]]:
    tasks = tuple(plan.tasks)
    if kind == "single-task":
        return [(task,) for task in tasks]
    if kind == "multi-task":
        return [tasks]
    assert grouping is not None  # Variant.uses_grouping
    groups = [tuple(group) for group in grouping["groups"]]
    if kind == "found groups":
        return groups
    return random_groups(tasks, [len(group) for group in groups], plan.config.seed)


def _track(session: Session, training: Training) -> None:
    """Log a finished training's results to its MLflow run."""
    label, folder = training.spec.label, training.artifact.download()
    result = read_json(folder / "result.json")
    names = (metric_of(result), "test_loss")
    session.tracker.log_metrics(
        label,
        {
            **{f"{name}/{task}": result[name][task] for name in names for task in result[name]},
            **{f"{name}/average": fmean(result[name].values()) for name in names},
            "trained_parameters": result["trained_parameters"],
            "training_seconds": result["seconds"],
        },
        step=0,
    )
    if (folder / HISTORY).exists():
        track_history(session, label, training.artifact)
    if (folder / ADAPTER).exists():
        session.tracker.log_artifact(label, folder / ADAPTER)
    session.tracker.end_run(label)


def random_groups(tasks: Sequence[str], sizes: Sequence[int], seed: int) -> tuple[tuple[str, ...], ...]:
    """Return a random partition into groups of these sizes; tasks keep their order within a group."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "random groups"))
    sampled = torch.randperm(len(tasks), generator=generator).split(list(sizes))
    return tuple(tuple(tasks[index] for index in sorted(group.tolist())) for group in sampled)


def _train_group(
    spec: TrainingSpec,
    artifact: Artifact,
    init_from: Sequence[Artifact],
    affinities: list[list[float]] | None,
    frozen_group_prompt: TrainedAdapter | None,
    progress: Any,
) -> None:
    """Train, or merge, and evaluate one group; `init_from`: trainings to start from or to merge, none: the method's
    initialization."""
    started, shard = time.monotonic(), DistributedShard.current()
    kind, reporter = get_method(spec.method), Reporter(progress, spec.label)
    config, towers, class_names = spec.config, spec.towers(kind.trains_weights), spec.class_names()
    method = build_method(spec, towers, init_from, affinities)
    if frozen_group_prompt:
        cast(GroupMmap, method).load_frozen_group_prompt(frozen_group_prompt.states[0])
    with artifact.writer(publish=shard.is_main_process) as writer:
        biases = spec.logit_biases(towers)
        if kind.trainable:
            epochs = training_config(spec.method, config).epochs
            spec.train(towers, method, epochs, writer, reporter, logit_biases=biases)
        states = (dict(method.state_dict()),)
        trained = TrainedAdapter.on_towers(towers, spec.method, config, (class_names,), states, biases)
        with torch.no_grad():
            tokens = kind.tokenize(config, towers.tokenizer, class_names)
            classifier = Classifier(towers, [(class_names, tokens, method())], config.clip.precision, biases)
        predictions = _predictions(spec, classifier, reporter, shard)
        if kind.merges:
            num_trained = sum(
                read_json(source.download() / "result.json")["trained_parameters"] for source in init_from
            )
        else:
            num_trained = trained.num_parameters - sum(p.numel() for p in method.parameters() if not p.requires_grad)
        if shard.is_main_process:
            if kind.has_parameters():
                save_adapter(writer.folder / ADAPTER, trained)
            write_predictions(writer.folder / PREDICTIONS, predictions)
            result = {
                **_test_results(predictions, class_names),
                "test_loss": mean_loss(predictions),
                "trained_parameters": num_trained,
                "seconds": time.monotonic() - started,
            }
            write_json(writer.folder / "result.json", result)


def _test_results(
    predictions: Sequence[AnyPrediction], class_names: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Return task → accuracy, or of several labels task → mAP and its standard error."""
    if isinstance(predictions[0], Prediction):
        return {ACCURACY: accuracy(predictions)}
    by_task: dict[str, list[MultiLabelPrediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(cast(MultiLabelPrediction, prediction))
    scores = {
        task: MultiLabelScores.from_lists(class_names[task], [p.label for p in rows], [p.probabilities for p in rows])
        for task, rows in by_task.items()
    }
    return {
        MAP: {task: task_scores.value for task, task_scores in scores.items()},
        "standard_error": {task: task_scores.standard_error for task, task_scores in scores.items()},
    }


def build_method(
    spec: TrainingSpec, towers: ClipTowers, init_from: Sequence[Artifact], affinities: list[list[float]] | None
) -> nn.Module:
    """Build the method's module in its initial or merged state; arguments as of Training."""
    method = get_method(spec.method).build(spec.config, towers, spec.class_names()).to(towers.device)
    if affinities:
        cast(HiPro, method).build_tree(np.array(affinities))  # the only method with affinities
    states = (load_adapter(source.download() / ADAPTER).states[0] for source in init_from)
    if isinstance(method, MergedMethod):
        method.merge(spec.config, states)
    elif init_from:
        (state,) = states
        method.load_state_dict(state)
    return method


def _predictions(
    spec: TrainingSpec, classifier: Classifier, reporter: Reporter, shard: DistributedShard
) -> list[AnyPrediction]:
    reader, completed = spec.reader(), 0
    total = sum(reader.description.counts["test"][task] for task in spec.tasks)

    def on_images(count: int) -> None:
        nonlocal completed
        completed = min(completed + count * shard.world_size, total)
        if shard.is_main_process:
            reporter.update(completed, total, "test images")

    return spec.predictions(classifier, on_images)
