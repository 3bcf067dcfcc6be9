"""One training on several workers, by Ray Train: it starts them, joins them to a process group, and ends them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def train_on_workers(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    board: Any,
    num_workers: int,
    cpus: int,
    gpus: float,
    name: str,
    folder: Path,
) -> None:
    """Runs function(*arguments, board) on every worker, in one torch.distributed process group.

    Checkpoints are the training's own, so a run that is tried again goes on from them.

    Raises:
        UserError: what a worker raised for the user.
        ray.train.TrainingFailedError: anything else that ended a worker.
    """
    # Busy workers are no fault, but Ray Train takes them for one after a minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(7 * 24 * 3600))
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        lambda: function(*arguments, board),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, "GPU": gpus}
        ),
        run_config=RunConfig(name=name, storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise
