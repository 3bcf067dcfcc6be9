"""Executes a stage's work on Ray: only what is not finished, with retries, progress, and metrics to MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.runtime.cluster import StallReporter, WorkerResources, num_slots
from pipeline.runtime.data_parallel import train_on_workers
from pipeline.runtime.progress import ProgressDisplay
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.storage import Artifact, Storage
from pipeline.runtime.tracking.tracker import end_status


@dataclass(frozen=True)
class WorkItem:
    """One Ray task, `function(*arguments, progress)`, that makes `artifact` or a part of one."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    artifact: Artifact | None = None
    uses_gpu: bool = False
    """Takes the GPUs and cores of a training's worker; other work takes one core."""
    num_workers: int = 1
    """Above one: a data-parallel training, `function` runs on each worker."""
    tracked_as: str | None = None
    """MLflow run for the metrics that it reports."""


def _work(storage: Storage, item: WorkItem, progress: Any) -> Any:
    """On a worker."""
    progress.begin(item.label, ray.get_runtime_context().get_node_id())
    if not storage.is_bucket:
        storage.verify_access()  # this machine may have joined after the run began
    if item.artifact and item.artifact.is_complete():  # by an attempt whose worker died before it could say so
        return None
    return item.function(*item.arguments, progress)


_remote_work = ray.remote(_work)  # once: each that is made is sent to the cluster by itself


class Stage:
    """Context manager around a stage: its MLflow run, its progress, and its seconds for the report."""

    def __init__(self, session: Session, name: str, title: str):
        self.session, self.name, self.title = session, name, title
        self.display = ProgressDisplay(session.console, title)
        self.computed = False
        """Whether anything was made, not only found finished."""

    def __enter__(self) -> Stage:
        self.session.tracker.start_run(self.name, parent=PARENT, tags={"level": "stage", "stage": self.name})
        self._began = time.monotonic()
        self.display.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self.display.__exit__()
        tracker = self.session.tracker
        if error is not None:
            with suppress(UserError):  # the disk is full: that the error says
                tracker.end_run(self.name, end_status(error))
            return
        # What was found finished keeps the seconds that making it took.
        file = self.session.folder / "stage_seconds.json"
        recorded = read_json(file) if file.exists() else {}
        if self.computed or self.name not in recorded:
            recorded[self.name] = round(time.monotonic() - self._began, 3)
            write_json(file, recorded)
        self.session.stage_seconds[self.name] = recorded[self.name]
        tracker.log_metrics(self.name, {"seconds": recorded[self.name]}, step=0)
        tracker.end_run(self.name)
        found = "" if self.computed else "found finished; took "
        self.session.console.print(f"  {found}{recorded[self.name]:.1f} s", highlight=False)
        self.session.storage.upload(self.session.folder)

    def execute(self, work: Sequence[WorkItem]) -> list[Any]:
        """Runs unfinished work on the cluster, first come first served; returns the functions' values in order, None
        for what was finished before. A task whose worker dies is run again; a task that raises ends the others.

        Raises:
            UserError: what a task raised for the user, or a worker that died too often.
        """
        todo = [item for item in work if not (item.artifact and item.artifact.is_complete())]
        self.computed |= bool(todo)
        # A data-parallel training that waits for its workers holds processes of Ray Train: no more than have room.
        cluster = self.session.cluster
        shared = [item for item in todo if item.num_workers > 1]
        room = max(1, num_slots(self.session.worker_resources) // cluster.workers_per_training)
        queue = shared[room:]
        item_of = {self._submit(item): item for item in todo if item not in queue}
        value_of: dict[str, Any] = {}
        waiting = list(item_of)
        patience = StallReporter(
            lambda text: self.session.console.print(f"  {text}", style="yellow", markup=False, highlight=False)
        )
        try:
            while waiting:
                if self.session.cancelled.is_set():
                    raise InterruptedError(f"stage {self.name!r} was told to stop")
                done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.3)
                self._show_reports(todo)
                if not done:
                    self._look(patience, [item_of[ref] for ref in waiting])
                for ref in done:
                    value_of[item_of[ref].label] = self._value(ref, item_of[ref].label)
                    if item_of[ref] in shared and queue:
                        waiting.append(following := self._submit(queue[0]))
                        item_of[following] = queue.pop(0)
        except BaseException:
            for ref in waiting:
                ray.cancel(ref, force=True)
            raise
        self._show_reports(todo)
        return [value_of.get(item.label) for item in work]

    def _submit(self, item: WorkItem) -> ray.ObjectRef[Any]:
        session, cluster = self.session, self.session.cluster
        options = {"name": item.label, "max_retries": cluster.max_retries}
        worker_resources, arguments = self._needs(item), (session.storage, item, session.progress)
        if item.num_workers == 1:
            return _remote_work.options(
                num_cpus=worker_resources.cpus, num_gpus=worker_resources.gpus, **options
            ).remote(*arguments)

        from ray.train import TrainingFailedError  # takes a second to import, and most trainings do without

        fewest = cluster.min_workers_per_training or item.num_workers
        assert item.artifact is not None  # a training makes one
        name = f"{item.artifact.stage}-{item.artifact.key}"
        return (
            ray.remote(train_on_workers)
            .options(num_cpus=0, retry_exceptions=[TrainingFailedError], **options)
            .remote(_work, arguments, (fewest, item.num_workers), worker_resources, name, session.storage)
        )

    def _needs(self, item: WorkItem) -> WorkerResources:
        return self.session.worker_resources if item.uses_gpu else WorkerResources(1, 0)

    def _look(self, patience: StallReporter, waiting: Sequence[WorkItem]) -> None:
        begun = self.session.progress.begun()
        running_on = [begun[item.label] for item in waiting if item.label in begun]
        largest = max(waiting, key=lambda item: item.num_workers)
        workers = 1
        if largest.num_workers > 1:
            workers = self.session.cluster.min_workers_per_training or largest.num_workers
        patience.look([item.label for item in waiting], running_on, self._needs(largest), workers)

    def _show_reports(self, work: Sequence[WorkItem]) -> None:
        tracked_as = {item.label: item.tracked_as for item in work}
        for report in self.session.progress.take():
            self.display.show(report)
            if name := tracked_as.get(report.label):
                for step, metrics in report.metrics:
                    self.session.tracker.log_metrics(name, metrics, step)

    def _value(self, ref: ray.ObjectRef[Any], label: str) -> Any:
        """Raises: UserError: what the task raised for the user, or a worker that died too often."""
        try:
            return ray.get(ref)
        except RayError as error:
            raise self._explained(error, label) from error

    def _explained(self, error: Exception, label: str) -> Exception:
        from ray.train import TrainingFailedError

        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            return UserError(f"{label}: {error.cause}")
        if isinstance(error, RayTaskError) and isinstance(error.cause, TrainingFailedError):
            error = error.cause
        if isinstance(error, WorkerCrashedError | NodeDiedError | OutOfMemoryError | TrainingFailedError):
            return UserError(
                f"the worker of {label!r} in stage {self.name!r} died {self.session.cluster.max_retries + 1} times: "
                f"{error}. Ray's logs say why; out of memory is the usual cause (fewer trainings at once: raise "
                "cluster.cpus_per_worker or gpus_per_worker; smaller ones: lower training.batch_size). "
                "The same command goes on where this one stopped"
            )
        return error
