"""Helpers of the fault-injection tests."""

from __future__ import annotations

from pathlib import Path

from pipelines import Finished, Job, numbers
from servers import Server


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


def same(storage: Path, undisturbed) -> bool:
    assert numbers(storage) == numbers(undisturbed)
    return True
