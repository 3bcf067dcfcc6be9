"""Stage 2: one MmAP shared by all tasks, and snapshots of what each task's gradient wants of it (Eq. 8)."""

from __future__ import annotations

from typing import Any

from pipeline.config import Config
from pipeline.methods.mmap import SharedMmap
from pipeline.runtime.progress import Reporter
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage, Work
from pipeline.runtime.storage import Artifact
from pipeline.stages.flow import titled
from pipeline.stages.plan import Plan
from pipeline.stages.training_work import TrainingWork, track_history, training_made_from
from pipeline.training.distributed import DistributedShard
from pipeline.training.snapshots import write_snapshots, write_trajectory

NAME = "global_prompt"
SNAPSHOTS, POINTS = "snapshots.parquet", "points.parquet"
FORMAT = 2
"""Of those files."""


def train_global_prompt(plan: Plan, session: Session) -> Artifact:
    """Trains the global prompt unless its snapshots are there; the splits must be finished."""
    work = global_prompt_work(plan)
    assert work.artifact is not None
    with Stage(session, NAME, titled(NAME)) as stage:
        stage.execute([work])
        track_history(session, NAME, work.artifact)
        parameters = plan.mmap_shape.num_parameters
        session.tracker.log_params(NAME, {"epochs": _epochs(plan.config), "trained_parameters": parameters})
    return work.artifact


def global_prompt_work(plan: Plan) -> Work:
    """What makes the global prompt's artifact."""
    config, epochs = plan.config, _epochs(plan.config)
    inputs = training_made_from(plan, "mmap", plan.tasks, "training", "global_prompt", epochs=epochs)
    artifact = plan.artifact(NAME, {**inputs, "tasks": plan.tasks, "format": FORMAT})
    work = TrainingWork(config, plan.splits, tuple(plan.tasks), "global prompt")
    workers = config.cluster.workers_per_training
    return Work(work.label, _train, (work, epochs, artifact), artifact, True, workers, tracked_as=NAME)


def _epochs(config: Config) -> int:
    return config.global_prompt.epochs or config.training.epochs


def _train(work: TrainingWork, epochs: int, artifact: Artifact, board: Any) -> None:
    config, towers, first = work.config, work.towers(), DistributedShard.current().first
    prompts = SharedMmap.build(config, towers, work.tasks).to(towers.device)
    with artifact.writer(publish=first) as made:
        snapshots = work.train(
            towers,
            prompts,
            epochs,
            made,
            Reporter(board, work.label),
            snapshot=prompts.task_gradients,
            snapshot_every=config.global_prompt.snapshot_every,
        )
        if first:
            write_snapshots(made.folder / SNAPSHOTS, work.tasks, snapshots, prompts.gradient_layout())
            write_trajectory(made.folder / POINTS, snapshots)
