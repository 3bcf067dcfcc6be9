"""Stage: runs unfinished work items on Ray, with retries, progress and MLflow metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from pipeline.errors import UserError
from pipeline.files import DamagedFile, read_record, write_record
from pipeline.interrupts import set_resume_point
from pipeline.runtime.cluster import StallReporter, WorkerResources, num_slots
from pipeline.runtime.data_parallel import train_on_workers
from pipeline.runtime.progress import ProgressDisplay
from pipeline.runtime.session import PARENT, Session
from pipeline.runtime.storage import Artifact, Storage
from pipeline.runtime.tracking.tracker import end_status

MAX_TRAININGS_SHOWN = 3


@dataclass(frozen=True)
class WorkItem:
    """One Ray task, `function(*arguments, progress)`, that writes `artifact` or a part of one."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    artifact: Artifact | None = None
    uses_gpu: bool = False
    """Reserves the GPUs and cores of a training worker; other work reserves one core."""
    num_workers: int = 1
    """Above one: data-parallel training; `function` runs on each worker."""
    tracked_as: str | None = None
    """Local name of the MLflow run that gets its metrics."""


def _run_item(storage: Storage, item: WorkItem, progress: Any) -> Any:
    """Run a work item on a worker."""
    progress.begin(item.label, ray.get_runtime_context().get_node_id())
    if not storage.is_bucket:
        storage.verify_access()  # this machine may have joined after the run started
    if item.artifact and item.artifact.is_complete():  # by an attempt whose worker died before it returned
        storage.remove(item.artifact.staging_dir)
        return None
    return item.function(*item.arguments, progress)


_remote_run_item = ray.remote(_run_item)  # created once: Ray exports each remote function separately


class Stage:
    """Context manager for a stage: its MLflow run, its progress, and its seconds for the report."""

    def __init__(self, session: Session, name: str, title: str):
        self.session, self.name, self.title = session, name, title
        self.display = ProgressDisplay(session.console, title)
        self.computed = False
        """True if anything was computed, False if all was cached."""

    def __enter__(self) -> Stage:
        self.session.tracker.start_run(self.name, parent=PARENT, tags={"level": "stage", "stage": self.name})
        self._started_at = time.monotonic()
        try:
            self.display.__enter__()
        except BaseException as error:  # a signal: the title may be there already
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self.display.__exit__()
        tracker = self.session.tracker
        if error is not None:
            if isinstance(error, KeyboardInterrupt):
                set_resume_point(self._resume_point())
            with suppress(UserError):  # a full disk, which `error` reports
                tracker.end_run(self.name, end_status(error))
            return
        # A cached stage keeps the seconds that computing it took.
        file = self.session.folder / "stage_seconds.json"
        recorded: dict[str, float] = {}
        with suppress(FileNotFoundError, DamagedFile):  # seconds that are lost are only not shown
            recorded = read_record(file)
        if self.computed or self.name not in recorded:
            recorded[self.name] = round(time.monotonic() - self._started_at, 3)
            write_record(file, recorded)
        self.session.stage_seconds[self.name] = recorded[self.name]
        tracker.log_metrics(self.name, {"seconds": recorded[self.name]}, step=0)
        tracker.end_run(self.name)
        seconds = f"{recorded[self.name]:.1f} s"
        self.session.console.print(
            f"  {seconds if self.computed else f'cached (computed in {seconds})'}", highlight=False
        )
        self.session.storage.upload(self.session.folder)

    def _resume_point(self) -> str:
        """Return what the next run of an interrupted stage begins with: its unfinished trainings at their newest
        checkpoints."""
        trainings = [
            f"step {report.saved} of {report.total}" + (f" of {label}" if label not in self.title else "")
            for label, report in self.display.saved.items()
            if report.completed < report.total
        ]
        return f"stage {', '.join([self.title, *trainings[:MAX_TRAININGS_SHOWN]])}" + (
            f" and {len(trainings) - MAX_TRAININGS_SHOWN} more trainings" * (len(trainings) > MAX_TRAININGS_SHOWN)
        )

    def execute(self, items: Sequence[WorkItem]) -> list[Any]:
        """Run unfinished work on the cluster, first come first served; return the functions' values in order, None for
        cached items. A task whose worker dies is retried; a task that raises cancels the others.

        Raises:
            UserError: A task raised it, or its worker died too often.
        """
        todo = [item for item in items if not (item.artifact and item.artifact.is_complete())]
        if not todo:
            return [None] * len(items)
        self.computed = True
        # A waiting data-parallel training holds processes of Ray Train, so only as many are submitted as fit.
        cluster = self.session.cluster
        data_parallel = [item for item in todo if item.num_workers > 1]
        capacity = max(1, num_slots(self.session.worker_resources) // cluster.workers_per_training)
        queue = data_parallel[capacity:]
        ref_to_item = {self._submit(item): item for item in todo if item not in queue}
        label_to_value: dict[str, Any] = {}
        waiting = list(ref_to_item)
        stall_reporter = StallReporter(
            lambda text: self.session.console.print(f"  {text}", style="yellow", markup=False, highlight=False)
        )
        try:
            while waiting:
                if self.session.cancelled.is_set():
                    raise InterruptedError(f"stage {self.name!r} was cancelled")
                ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.3)
                self._drain_progress(todo)
                if not ready:
                    self._report_stall(stall_reporter, [ref_to_item[ref] for ref in waiting])
                for ref in ready:
                    label_to_value[ref_to_item[ref].label] = self._value(ref, ref_to_item[ref].label)
                    if ref_to_item[ref] in data_parallel and queue:
                        waiting.append(next_ref := self._submit(queue[0]))
                        ref_to_item[next_ref] = queue.pop(0)
        except BaseException:
            for ref in waiting:
                ray.cancel(ref, force=True)
            with suppress(Exception):  # where Ray is gone, the reports so far do
                self._drain_progress(todo)
            raise
        self._drain_progress(todo)
        return [label_to_value.get(item.label) for item in items]

    def _submit(self, item: WorkItem) -> ray.ObjectRef[Any]:
        session, cluster = self.session, self.session.cluster
        options = {"name": item.label, "max_retries": cluster.max_retries}
        resources, arguments = self._resources(item), (session.storage, item, session.progress)
        if item.num_workers == 1:
            return _remote_run_item.options(num_cpus=resources.cpus, num_gpus=resources.gpus, **options).remote(
                *arguments
            )

        from ray.train import TrainingFailedError  # takes a second to import; most trainings do not need it

        min_workers = cluster.min_workers_per_training or item.num_workers
        assert item.artifact is not None  # a training writes one
        name = f"{item.artifact.stage}-{item.artifact.key}"
        # Ray Train's actors look for the cluster in the environment, then for any Ray of the machine, also another one.
        environment = {"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}}
        return (
            ray.remote(train_on_workers)
            .options(num_cpus=0, retry_exceptions=[TrainingFailedError], runtime_env=environment, **options)
            .remote(_run_item, arguments, (min_workers, item.num_workers), resources, name, session.storage)
        )

    def _resources(self, item: WorkItem) -> WorkerResources:
        return self.session.worker_resources if item.uses_gpu else WorkerResources(1, 0)

    def _report_stall(self, stall_reporter: StallReporter, waiting: Sequence[WorkItem]) -> None:
        nodes = self.session.progress.nodes()
        if not self.display.has_reports and any(item.uses_gpu and item.label in nodes for item in waiting):
            self.session.say("loading CLIP ...")
        running_on = [nodes[item.label] for item in waiting if item.label in nodes]
        largest = max(waiting, key=lambda item: item.num_workers)
        workers = 1
        if largest.num_workers > 1:
            workers = self.session.cluster.min_workers_per_training or largest.num_workers
        stall_reporter.poll([item.label for item in waiting], running_on, self._resources(largest), workers)

    def _drain_progress(self, items: Sequence[WorkItem]) -> None:
        tracked_as = {item.label: item.tracked_as for item in items}
        for report in self.session.progress.drain():
            self.display.show(report)
            if name := tracked_as.get(report.label):
                self.session.tracker.log_metric_history(name, report.metrics)

    def _value(self, ref: ray.ObjectRef[Any], label: str) -> Any:
        """Return the task's value. Raises: UserError: The task raised it, or its worker died too often."""
        try:
            return ray.get(ref)
        except RayError as error:
            raise self._to_user_error(error, label) from error

    def _to_user_error(self, error: Exception, label: str) -> Exception:
        from ray.train import TrainingFailedError

        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            return UserError(f"{label}: {error.cause}")
        if isinstance(error, RayTaskError) and isinstance(error.cause, TrainingFailedError):
            error = error.cause
        if isinstance(error, WorkerCrashedError | NodeDiedError | OutOfMemoryError | TrainingFailedError):
            return UserError(
                f"the worker of {label!r} in stage {self.name!r} died {self.session.cluster.max_retries + 1} times: "
                f"{error}. See Ray's logs; the usual cause is out of memory: raise cluster.cpus_per_worker or "
                "gpus_per_worker (fewer trainings at once), or lower training.batch_size. Rerun the same command to "
                "resume"
            )
        return error
