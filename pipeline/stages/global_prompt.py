"""Stage 2: one MmAP shared by all tasks, and snapshots of what each task's gradient wants of it (Eq. 8)."""

from __future__ import annotations

from typing import Any

from pipeline.config import Config
from pipeline.methods.mmap import SharedMmap
from pipeline.runtime.progress import Reporter
from pipeline.runtime.run import Run
from pipeline.runtime.stage import Stage, Work
from pipeline.runtime.storage import Artefact
from pipeline.stages.flow import titled
from pipeline.stages.training_work import TrainingWork, track_history, trainings_decided_by
from pipeline.training.share import Share
from pipeline.training.snapshots import write_points, write_snapshots

NAME = "global_prompt"
SNAPSHOTS, POINTS = "snapshots.parquet", "points.parquet"
FORMAT = 2
"""Of those files."""


def train_global_prompt(run: Run) -> Artefact:
    """Trains the global prompt unless its snapshots are there; the splits must be finished."""
    work = global_prompt_work(run)
    assert work.artefact is not None
    with Stage(run, NAME, titled(NAME)) as stage:
        stage.execute([work])
        track_history(run, NAME, work.artefact)
        parameters = run.mmap_shape.num_parameters
        run.tracker.log_params(NAME, {"epochs": _epochs(run.config), "trained_parameters": parameters})
    return work.artefact


def global_prompt_work(run: Run) -> Work:
    """What makes the global prompt's artefact."""
    config, epochs = run.config, _epochs(run.config)
    artefact = run.artefact(
        NAME,
        {
            **trainings_decided_by(run, run.tasks, epochs=epochs),
            "tasks": run.tasks,
            "snapshot_every": config.global_prompt.snapshot_every,
            "format": FORMAT,
        },
    )
    work = TrainingWork(config, run.splits, tuple(run.tasks), "global prompt")
    workers = config.cluster.workers_per_training
    return Work(work.label, _train, (work, epochs, artefact), artefact, True, workers, tracked_as=NAME)


def _epochs(config: Config) -> int:
    return config.global_prompt.epochs or config.training.epochs


def _train(work: TrainingWork, epochs: int, artefact: Artefact, board: Any) -> None:
    config, towers, first = work.config, work.towers(), Share.of_this_process().first
    prompts = SharedMmap.build(config, towers, work.tasks).to(towers.device)
    with artefact.making(publish=first) as made:
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
            write_points(made.folder / POINTS, snapshots)
