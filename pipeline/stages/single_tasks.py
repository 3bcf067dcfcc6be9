"""Stage 3: each task trained alone, and what the tasks gain from each other's prompts on their training images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from pipeline.clip.precision import uses_bfloat16
from pipeline.data.parquet import SplitReader
from pipeline.grouping.affinities import Features, Transfer
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.adapter_file import load_adapter
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import GroupMmap
from pipeline.runtime.progress import Reporter
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import stage_title
from pipeline.stages.group_trainings import ADAPTER, Training, execute_trainings, plan_trainings
from pipeline.stages.grouping_sources import PROMPTS_OF, TASKS, SingleTasks
from pipeline.stages.plan import Plan
from pipeline.stages.training_spec import TrainingSpec, feature_inputs, training_config_values
from pipeline.training.evaluate import evaluate, evaluate_features
from pipeline.training.frozen_features import frozen_split_features
from pipeline.training.training_losses import write_losses

NAME = "single_tasks"
LOSSES = "losses.parquet"
FORMAT = 1
"""Of that file."""
VARIANT = "each_alone"


def train_single_tasks(plan: Plan, session: Session, existing: SingleTasks | None = None) -> SingleTasks | None:
    """Train each task alone, and measure the losses of all training images under each one's prompts and under zero-shot
    CLIP, as far as the run's affinities need them; None if they need nothing.

    Args:
        existing: tasks of a finished run, whose images and prompts are measured with the new ones'; they are not in the
            result.
    """
    if not {Transfer.name, Features.name} & set(plan.affinities):
        return None
    trainings = single_task_trainings(plan)
    losses = loss_work_items(plan, trainings, existing)
    with Stage(session, NAME, stage_title(NAME)) as stage:
        execute_trainings(session, stage, trainings)
        stage.execute(losses)
        numbers = {"trainings": len(trainings), "evaluations": sum(len(item.arguments[0].tasks) for item in losses)}
        session.tracker.log_params(NAME, numbers)
    return single_tasks(plan, trainings, losses)


def single_task_trainings(plan: Plan) -> list[Training]:
    """Return the trainings of each task alone, if the run's affinities need them: those of the variant `each_alone`."""
    return plan_trainings(plan, VARIANT, None, {}) if Transfer.name in plan.affinities else []


def single_tasks(plan: Plan, trainings: Sequence[Training], losses: Sequence[WorkItem]) -> SingleTasks:
    """Return the artifacts of these trainings and losses."""
    artifacts = tuple(item.artifact for item in losses if item.artifact)
    return SingleTasks(_adapters(trainings), artifacts, (plan.splits,))


def _adapters(trainings: Sequence[Training]) -> dict[str, Artifact]:
    return dict(
        zip(chain.from_iterable(training.spec.tasks for training in trainings), (t.artifact for t in trainings))
    )


def loss_work_items(plan: Plan, trainings: Sequence[Training], existing: SingleTasks | None = None) -> list[WorkItem]:
    """Return work that measures losses, an item for each prompts and splits; that of prompts needs their training."""
    adapters, splits = _adapters(trainings), [plan.splits]
    items = [_loss_work_item(plan, plan.splits, None, None)]
    if existing and adapters:
        items += [_loss_work_item(plan, plan.splits, *adapter) for adapter in existing.adapters.items()]
        splits += existing.splits
    return items + [_loss_work_item(plan, part, *adapter) for part in splits for adapter in adapters.items()]


def _loss_work_item(plan: Plan, splits: Artifact, prompts_of: str | None, adapter: Artifact | None) -> WorkItem:
    description = SplitReader(splits.download("splits.json")).description
    tasks = description.tasks
    inputs = {
        **feature_inputs(plan),
        "splits": description.content,
        "class_names": {task: description.class_names_for(task) for task in tasks},
        "config": training_config_values(plan.config, "mmap", tasks, "evaluation"),
        TASKS: tasks,
        PROMPTS_OF: prompts_of,
        "adapter": adapter.key if adapter else None,
        "format": FORMAT,
    }
    artifact = plan.artifact(NAME, inputs)
    label = f"losses under the prompts of {prompts_of}" if prompts_of else "losses and features of zero-shot CLIP"
    if splits != plan.splits:
        label += f": {', '.join(tasks)}"
    spec = TrainingSpec(plan.config, splits, tuple(tasks), label)
    return WorkItem(label, _measure_losses, (spec, artifact, prompts_of, adapter), artifact, uses_gpu=True)


def _measure_losses(
    spec: TrainingSpec, artifact: Artifact, prompts_of: str | None, adapter: Artifact | None, progress: Any
) -> None:
    config, towers, reader, adaptation = spec.config, spec.towers(), spec.reader(), Adaptation()
    if prompts_of and adapter:
        prompts = GroupMmap.build(config, towers, [prompts_of]).to(towers.device)
        prompts.load_state_dict(load_adapter(adapter.download() / ADAPTER).states[0])
        with torch.no_grad():
            adaptation = prompts()
    names = spec.class_names()
    heads = [
        ((task,), GroupMmap.tokenize(config, towers.tokenizer, {task: names[task]}), adaptation) for task in spec.tasks
    ]
    # As in training, not as in evaluation: the grouping must not depend on the processor.
    precision = "bfloat16" if uses_bfloat16(towers, config.clip.precision) else "float32"
    classifier = Classifier(towers, heads, precision, spec.logit_biases(towers))
    reporter, completed = Reporter(progress, spec.label), 0
    total = sum(reader.description.counts["train"][task] for task in spec.tasks)

    def on_images(count: int) -> None:
        nonlocal completed
        completed += count
        reporter.update(completed, total, "training images")

    threads = config.cluster.cpus_per_worker
    features: dict[str, torch.Tensor] = {}
    if adapter:
        predictions = evaluate(classifier, reader, spec.tasks, threads, on_images, "train")
    else:
        for task in spec.tasks:
            features[task] = frozen_split_features(towers, reader, task, threads, precision, split="train")
            on_images(len(features[task]))
        predictions = evaluate_features(classifier, reader, features, "train")
    with artifact.writer() as writer:
        write_losses(writer.folder / LOSSES, predictions, features)
