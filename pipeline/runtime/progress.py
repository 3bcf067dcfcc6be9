"""Progress of work: completed steps, speed, remaining time.

Workers report to one small Ray actor. The driver drains it and draws progress bars or, if the output is not a terminal
(a Ray job's log), prints a line per work item at most every few seconds.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.runtime.system_metrics import SystemSampler

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

REPORT_EVERY_S = 0.5
LOG_LINE_EVERY_S = 10
LONG_LOG_LINE_EVERY_S = 60
"""Interval between the lines of work that has run for longer than this."""


def run_progress(say: Callable[[str], None]) -> RunProgress:
    """Return the progress of a new run; `say` is told where the first workers of this driver are started."""
    if not _progress_actor.cache_info().currsize:
        say("starting workers ...")
    context = ray.get_runtime_context()
    return RunProgress(_progress_actor(context.get_node_id(), context.get_job_id()), uuid.uuid4().hex)


@lru_cache(maxsize=1)
def _progress_actor(node_id: str, job_id: str) -> Any:
    """Start a ProgressActor on the driver's machine, where the loss of another machine cannot end it. A process takes a
    second to start, so all runs of a driver share it; it ends when the driver disconnects."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressActor)
    return actor.options(scheduling_strategy=strategy).remote()


@dataclass(frozen=True)
class RunProgress:
    """Handle of one run's part of the driver's ProgressActor; sent to its workers."""

    actor: Any
    run: str

    def begin(self, label: str, node_id: str) -> None:
        """Record that work has started on a node, perhaps again."""
        self.actor.begin.remote(self.run, label, node_id)

    def nodes(self) -> dict[str, str]:
        """Return label → id of the node where that work started last."""
        nodes: dict[str, str] = ray.get(self.actor.nodes.remote(self.run))
        return nodes

    def post(self, report: Report) -> None:
        self.actor.post.remote(self.run, report)

    def expect(self, label: str, total: int, unit: str) -> None:
        """Start a count to which several workers add."""
        self.actor.expect.remote(self.run, label, total, unit)

    def advance(self, label: str, count: int, unit: str) -> None:
        self.actor.advance.remote(self.run, label, count, unit)

    def drain(self) -> list[Report]:
        """Return the reports since the last call."""
        reports: list[Report] = ray.get(self.actor.drain.remote(self.run))
        return reports


class ProgressActor:
    """Collects the workers' reports, by run, until the driver drains them. Losing them loses no results."""

    def __init__(self) -> None:
        self._reports: dict[str, list[Report]] = defaultdict(list)
        self._totals: dict[tuple[str, str, str], list[int]] = {}
        self._nodes: dict[str, dict[str, str]] = defaultdict(dict)

    def begin(self, run: str, label: str, node_id: str) -> None:
        self._nodes[run][label] = node_id

    def nodes(self, run: str) -> dict[str, str]:
        return self._nodes[run]

    def post(self, run: str, report: Report) -> None:
        self._reports[run].append(report)

    def expect(self, run: str, label: str, total: int, unit: str) -> None:
        self._totals[run, label, unit] = [0, total]
        self.post(run, Report(label, 0, total, unit))

    def advance(self, run: str, label: str, count: int, unit: str) -> None:
        counts = self._totals.setdefault((run, label, unit), [0, count])
        counts[0] = min(counts[0] + count, counts[1])  # a retried task counts again
        self.post(run, Report(label, counts[0], counts[1], unit))

    def drain(self, run: str) -> list[Report]:
        return self._reports.pop(run, [])


@dataclass
class Report:
    """`completed` of `total` `unit`s of the work `label`, and (step, name → value) measured since the last report."""

    label: str
    completed: int
    total: int
    unit: str
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    saved: int | None = None
    """Completed units of the newest checkpoint, at which an interrupted training resumes; None: it has no
    checkpoints."""
    resumed: bool = False
    """True: the first report of an attempt that follows an interrupted one."""


class Reporter:
    """Worker side: posts at most every REPORT_EVERY_S, and at the end of a phase, with system metrics."""

    def __init__(self, progress: RunProgress, label: str):
        self._progress, self._label = progress, label
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._posted_at = 0.0
        self._saved: int | None = None
        self._system = SystemSampler()

    def start(self, saved: int, total: int, unit: str, resumed: bool) -> None:
        """Report the checkpoint from which a training starts, and whether an earlier attempt was interrupted."""
        self._progress.post(Report(self._label, saved, total, unit, saved=saved, resumed=resumed))

    def update(
        self,
        completed: int,
        total: int,
        unit: str,
        metrics: tuple[int, dict[str, float]] | None = None,
        saved: int | None = None,
    ) -> None:
        if metrics:
            self._metrics.append(metrics)
        if system := self._system.sample(final=completed >= total):
            self._metrics.append(system)
        if time.monotonic() - self._posted_at >= REPORT_EVERY_S or completed >= total or saved != self._saved:
            self._progress.post(Report(self._label, completed, total, unit, self._metrics, saved))
            self._metrics, self._posted_at, self._saved = [], time.monotonic(), saved


class ProgressDisplay:
    """Driver side: a context manager for one stage."""

    def __init__(self, console: Console, title: str):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._title = console, title
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._started: dict[tuple[str, str], tuple[float, int]] = {}
        self._line_times: dict[str, float] = {}
        self.saved: dict[str, Report] = {}
        """Label of a training → its last report."""

    @property
    def has_reports(self) -> bool:
        return bool(self._tasks)

    def __enter__(self) -> ProgressDisplay:
        self._console.print(f"[bold]{self._title}[/]")
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, report: Report) -> None:
        from rich.markup import escape

        if report.saved is not None:
            self.saved[report.label] = report
        if report.resumed:
            self._console.print(
                f"  {report.label}: resumes at step {report.saved} of {report.total}", markup=False, highlight=False
            )
        key = (report.label, report.unit)
        time_now = time.monotonic()
        started, initial = self._started.setdefault(key, (time_now, report.completed))
        # Reports that arrive together at the first poll have no speed.
        elapsed = time_now - started
        throughput = (report.completed - initial) / elapsed if elapsed >= REPORT_EVERY_S else 0.0
        speed = f"{throughput:,.{0 if throughput >= 10 else 1}f} {report.unit}/s" if throughput else report.unit
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(escape(report.label), total=report.total, speed=speed)
        self._bars.update(self._tasks[key], completed=report.completed, total=report.total, speed=speed)
        interval = LOG_LINE_EVERY_S if elapsed < LONG_LOG_LINE_EVERY_S else LONG_LOG_LINE_EVERY_S
        if not self._console.is_terminal and time_now - self._line_times.get(report.label, started) >= interval:
            self._line_times[report.label] = time_now
            remaining = f", {(report.total - report.completed) / throughput:.0f} s left" if throughput else ""
            self._console.print(
                f"  {report.label}: {report.completed} of {report.total} {report.unit}, {speed}{remaining}",
                markup=False,
                highlight=False,
            )
