"""Helpers of the fault-injection tests."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import Finished, Job, numbers
from servers import Server

from pipeline.files import read_json


def checkpoints(storage: Path, stage: str, name: str = "checkpoint.pt") -> list[Path]:
    return list((storage / stage).glob(f".staging-*/checkpoints/{name}"))


def group_checkpoints(storage: Path) -> list[Path]:
    """Return the checkpoints of stage 5; before the tasks are grouped, those of that folder are of stage 3."""
    return checkpoints(storage, "group_trainings") if list((storage / "grouping").glob("[!.]*")) else []


def lost(server: Server, job: Job, condition) -> Finished:
    """A server is killed in the midst of a job, which ends by itself."""
    try:
        job.wait_until(condition)
        server.kill()
    finally:
        finished = job.finish()
    return finished


@contextmanager
def suspended(job: Job) -> Iterator[None]:
    """The job's own process stands still; Ray and its workers go on."""
    job.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        job.process.send_signal(signal.SIGCONT)


def same(storage: Path, undisturbed) -> bool:
    assert numbers(storage) == numbers(undisturbed)
    return True


def without_trainings_of_groups(undisturbed: Path, storage: Path) -> Path:
    """Copy a storage with the splits and the trainings of single tasks, and nothing else that was trained."""
    shutil.copytree(undisturbed, storage)
    trainings = list(storage.glob("group_trainings/[!.]*"))
    together = [folder for folder in trainings if len(read_json(folder / "artifact.json")["inputs"]["group"]) > 1]
    assert len(trainings) > len(together) > 1
    for folder in [*together, *(storage / stage for stage in ("global_prompt", "image_features", "runs"))]:
        shutil.rmtree(folder)
    (storage / "mlflow.db").unlink()
    return storage
