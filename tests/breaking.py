"""Helpers of the fault-injection tests."""

from __future__ import annotations

from pathlib import Path

from pipelines import Finished, Job, numbers
from servers import Server


def checkpoints(storage: Path, stage: str, name: str = "checkpoint.pt") -> list[Path]:
    return list((storage / stage).glob(f".staging-*/checkpoints/{name}"))


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
