"""One training on several workers, by Ray Train: it starts them, joins them to a process group, and ends them."""

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
    """Runs function(*arguments) on every worker, in one torch.distributed process group.

    Checkpoints are the training's own, so a run that is tried again goes on from them.

    Args:
        num_workers: the fewest and the most. Between them Ray Train takes what the cluster has, anew after each worker
            that leaves; the numbers do not depend on it.

    Raises:
        UserError: what a worker raised for the user.
        ray.train.TrainingFailedError: anything else that ended a worker.
    """
    fewest, most = num_workers
    # Busy workers are no fault, but Ray Train takes them for one after a minute. Where it may take fewer, it must look
    # again soon: it may have counted a machine that was just lost.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30" if fewest < most else str(7 * 24 * 3600)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    filesystem, place = storage.filesystem(storage.folder / ".ray-train")
    trainer = TorchTrainer(
        lambda: function(*arguments),
        scaling_config=ScalingConfig(
            # A range is known to the class that Ray Train takes, not to the one whose types it shows.
            num_workers=most if fewest == most else cast(Any, num_workers),
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=place,
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
