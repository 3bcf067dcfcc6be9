"""Stage 2: training of one MmAP shared by all tasks, with snapshots of the gradient of each task (Eq. 8)."""

from __future__ import annotations

from typing import Any

from pipeline.config import Config
from pipeline.grouping.affinities import Gradient
from pipeline.methods.mmap import SharedMmap
from pipeline.runtime.progress import Reporter
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage, WorkItem
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import stage_title
from pipeline.stages.plan import Plan
from pipeline.stages.training_spec import TrainingSpec, track_history, training_inputs
from pipeline.training.distributed import DistributedShard
from pipeline.training.snapshots import write_snapshots, write_trajectory

NAME = "global_prompt"
SNAPSHOTS, POINTS = "snapshots.parquet", "points.parquet"
FORMAT = 2
"""Version of the format of those files."""


def train_global_prompt(plan: Plan, session: Session) -> Artifact | None:
    """Train the global prompt unless its artifact is complete, or the run does not need its gradients; the splits must
    be complete."""
    if Gradient.name not in plan.affinities:
        return None
    work_item = global_prompt_work_item(plan)
    assert work_item.artifact is not None
    with Stage(session, NAME, stage_title(NAME)) as stage:
        stage.execute([work_item])
        track_history(session, NAME, work_item.artifact)
        assert plan.mmap_shape, "a run that needs the global prompt was planned without MmAP"
        parameters = plan.mmap_shape.num_parameters
        session.tracker.log_params(NAME, {"epochs": _epochs(plan.config), "trained_parameters": parameters})
    return work_item.artifact


def global_prompt_work_item(plan: Plan) -> WorkItem:
    """Return the work item that writes the artifact of the global prompt."""
    config, epochs = plan.config, _epochs(plan.config)
    inputs = training_inputs(plan, "mmap", plan.tasks, "training", "global_prompt", epochs=epochs)
    artifact = plan.artifact(NAME, {**inputs, "tasks": plan.tasks, "format": FORMAT})
    spec = TrainingSpec(config, plan.splits, tuple(plan.tasks), "global prompt")
    workers = config.cluster.workers_per_training
    return WorkItem(spec.label, _train, (spec, epochs, artifact), artifact, True, workers, tracked_as=NAME)


def _epochs(config: Config) -> int:
    return config.global_prompt.epochs or config.training.epochs


def _train(spec: TrainingSpec, epochs: int, artifact: Artifact, progress: Any) -> None:
    config, towers, is_main = spec.config, spec.towers(), DistributedShard.current().is_main_process
    prompts = SharedMmap.build(config, towers, spec.tasks).to(towers.device)
    with artifact.writer(publish=is_main) as writer:
        snapshots = spec.train(
            towers,
            prompts,
            epochs,
            writer,
            Reporter(progress, spec.label),
            snapshot_every=config.global_prompt.snapshot_every,
            logit_biases=spec.logit_biases(towers),
        )
        if is_main:
            write_snapshots(writer.folder / SNAPSHOTS, spec.tasks, snapshots, prompts.gradient_layout())
            write_trajectory(writer.folder / POINTS, snapshots)
