"""Data-parallel training with Ray Train, which starts the workers, connects their process group and stops them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

from pipeline.errors import UserError
from pipeline.runtime.cluster import WorkerResources
from pipeline.runtime.storage import Storage


def train_on_workers(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    num_workers: tuple[int, int],
    resources: WorkerResources,
    name: str,
    storage: Storage,
) -> None:
    """Run function(*arguments) on every worker, in one torch.distributed process group.

    Checkpoints are those of the training, not of Ray Train, so a retry resumes from them.

    Args:
        num_workers: minimum and maximum. Ray Train takes what the cluster has in between, and again after each worker
            that is lost; results do not depend on it.

    Raises:
        UserError: A worker raised it.
        ray.train.TrainingFailedError: A worker failed otherwise.
    """
    min_workers, max_workers = num_workers
    # Ray Train gives up on busy workers after a minute, which is too early. An elastic training must retry soon, as it
    # may have counted a machine that was just lost.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30" if min_workers < max_workers else str(7 * 24 * 3600)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    filesystem, path = storage.filesystem(storage.folder / ".ray-train")
    trainer = TorchTrainer(
        lambda: function(*arguments),
        scaling_config=ScalingConfig(
            # Ray Train accepts a range of workers, which its type hints lack.
            num_workers=max_workers if min_workers == max_workers else cast(Any, num_workers),
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if storage.is_bucket else None,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise
