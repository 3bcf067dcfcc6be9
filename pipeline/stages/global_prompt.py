"""Stage 2: one MmAP shared by all tasks, and snapshots of what each task's gradient wants of it (Eq. 8)."""

from __future__ import annotations

import time
from typing import Any

from pipeline.methods.mmap import SharedMmap
from pipeline.progress import Reporter
from pipeline.run import Run
from pipeline.stages.stage import Stage, Work
from pipeline.stages.training_work import TrainingWork, track_history, trainings_decided_by
from pipeline.storage import Artefact
from pipeline.training.share import Share
from pipeline.training.snapshots import write_snapshots

NAME = "global_prompt"
SNAPSHOTS = "snapshots.parquet"


def train_global_prompt(run: Run) -> Artefact:
    """Trains the global prompt unless its snapshots are there; the splits must be finished."""
    config = run.config
    epochs = config.global_prompt.epochs or config.training.epochs
    artefact = run.artefact(
        NAME,
        {
            **trainings_decided_by(run, run.tasks, epochs=epochs),
            "tasks": run.tasks,
            "snapshot_every": config.global_prompt.snapshot_every,
        },
    )
    with Stage(run, NAME, "2 global prompt") as stage:
        work = TrainingWork(config, run.splits.folder, tuple(run.tasks), "global prompt")
        workers = config.cluster.workers_per_training
        stage.execute([Work(work.label, _train, (work, epochs, artefact), artefact, True, workers, tracked_as=NAME)])
        track_history(run, NAME, artefact)
        run.tracker.log_params(NAME, {"epochs": epochs, "trained_parameters": run.mmap_shape.num_parameters})
    return artefact


def _train(work: TrainingWork, epochs: int, artefact: Artefact, board: Any) -> None:
    if artefact.finished():  # by an attempt whose worker died before it could say so
        return
    began = time.monotonic()
    folder = artefact.start()
    config, towers = work.config, work.towers()
    prompts = SharedMmap.of(config, towers, work.tasks).to(towers.device)
    snapshots = work.train(
        towers,
        prompts,
        epochs,
        artefact,
        Reporter(board, work.label),
        snapshot=prompts.task_gradients,
        snapshot_every=config.global_prompt.snapshot_every,
    )
    if not Share.of_this_process().first:
        return
    write_snapshots(folder / SNAPSHOTS, work.tasks, snapshots, prompts.gradient_layout())
    artefact.finish(time.monotonic() - began)
