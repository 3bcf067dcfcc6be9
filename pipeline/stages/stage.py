"""Executes a stage's work on Ray: only what is not finished, with retries, progress, and metrics to MLflow."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from pipeline.errors import UserError
from pipeline.progress import ProgressDisplay
from pipeline.run import PARENT, Run
from pipeline.storage import Artefact, read_json, write_json


@dataclass(frozen=True)
class Work:
    """One Ray task, `function(*arguments, board)`, that makes `artefact` or a part of one."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    artefact: Artefact | None = None
    trains: bool = False
    """Takes the GPUs and cores of a training; other work takes one core."""
    tracked_as: str | None = None
    """MLflow run for the metrics that it reports."""


class Stage:
    """Context manager around a stage: its MLflow run, its progress, and its seconds for the report."""

    def __init__(self, run: Run, name: str, title: str):
        self.run, self.name, self.title = run, name, title
        self.display = ProgressDisplay(run.console, title)
        self.computed = False
        """Whether anything was made, not only found finished."""

    def __enter__(self) -> Stage:
        self.run.tracker.start_run(self.name, parent=PARENT, tags={"stage": self.name})
        self._began = time.monotonic()
        self.display.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self.display.__exit__()
        tracker = self.run.tracker
        if error is not None:
            tracker.end_run(self.name, "FAILED")
            return
        # What was found finished keeps the seconds that making it took.
        file = self.run.folder / "stage_seconds.json"
        recorded = read_json(file) if file.exists() else {}
        if self.computed or self.name not in recorded:
            recorded[self.name] = round(time.monotonic() - self._began, 3)
            write_json(file, recorded)
        self.run.stage_seconds[self.name] = recorded[self.name]
        tracker.log_metrics(self.name, {"seconds": recorded[self.name]}, step=0)
        tracker.end_run(self.name)
        found = "" if self.computed else "found finished; took "
        self.run.console.print(f"  {found}{recorded[self.name]:.1f} s", highlight=False)

    def execute(self, work: Sequence[Work]) -> list[Any]:
        """Runs unfinished work on the cluster, first come first served; returns the functions' values in order, None
        for what was finished before. A task whose worker dies is run again; a task that raises ends the others.

        Raises:
            UserError: what a task raised for the user, or a worker that died too often.
        """
        todo = [item for item in work if not (item.artefact and item.artefact.finished())]
        self.computed |= bool(todo)
        item_of = {self._submit(item): item for item in todo}
        value_of: dict[str, Any] = {}
        waiting = list(item_of)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.3)
                self._show_reports(todo)
                for ref in done:
                    value_of[item_of[ref].label] = ray.get(ref)
        except BaseException as error:
            for ref in waiting:
                ray.cancel(ref, force=True)
            raise self._explained(error) from error
        self._show_reports(todo)
        return [value_of.get(item.label) for item in work]

    def _submit(self, item: Work) -> ray.ObjectRef:
        cluster = self.run.config.cluster
        return (
            ray.remote(item.function)
            .options(
                name=item.label,
                num_cpus=cluster.cpus_per_training if item.trains else 1,
                num_gpus=self.run.gpus_per_training if item.trains else 0,
                max_retries=cluster.max_retries,
            )
            .remote(*item.arguments, self.run.board)
        )

    def _show_reports(self, work: Sequence[Work]) -> None:
        tracked_as = {item.label: item.tracked_as for item in work}
        for report in ray.get(self.run.board.take.remote()):
            self.display.show(report)
            if name := tracked_as.get(report.label):
                for step, metrics in report.metrics:
                    self.run.tracker.log_metrics(name, metrics, step)

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            return UserError(str(error.cause))
        if isinstance(error, RayTaskError) and getattr(error.cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"{error.cause}: free some space in {self.run.storage}, and run the same command to go on")
        if isinstance(error, WorkerCrashedError):
            return UserError(
                f"a worker of stage {self.name!r} died {self.run.config.cluster.max_retries + 1} times: {error}. "
                "Ray's logs say why; out of memory is the usual cause (fewer trainings at once: raise "
                "cluster.cpus_per_training or gpus_per_training; smaller ones: lower training.batch_size). "
                "The same command goes on where this one stopped"
            )
        return error
