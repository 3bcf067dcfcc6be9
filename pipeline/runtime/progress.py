"""What is being done, how far, how fast, and how long it will still take.

Workers report to one small Ray actor; the driver drains it and draws bars, or, where the output is no terminal (a Ray
job's log), prints a line for each work at most every few seconds.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.runtime.system_metrics import SystemSampler

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

REPORT_EVERY_S = 0.5
LOG_LINE_EVERY_S = 10
LONG_LOG_LINE_EVERY_S = 60
"""Between the lines of work that has run for longer than this."""


def run_progress() -> RunProgress:
    """A board for one run."""
    context = ray.get_runtime_context()
    return RunProgress(_board_of(context.get_node_id(), context.get_job_id()), uuid.uuid4().hex)


@lru_cache(maxsize=1)
def _board_of(node_id: str, job_id: str) -> Any:
    """A ProgressBoard on the driver's machine, so that no other machine's end takes it away. It is a process, which
    takes a second to start, so all runs of a driver share it: it ends as the driver leaves the cluster."""
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = cast(Any, ProgressActor)  # Ray's types show the class as it was before the decorator
    return actor.options(scheduling_strategy=here).remote()


@dataclass(frozen=True)
class RunProgress:
    """The part of the driver's ProgressBoard that is one run's; sent to its workers."""

    actor: Any
    run: str

    def begin(self, label: str, node_id: str) -> None:
        """Work has begun on a machine, perhaps again."""
        self.actor.begin.remote(self.run, label, node_id)

    def begun(self) -> dict[str, str]:
        """Label → id of the machine where that work began last."""
        begun: dict[str, str] = ray.get(self.actor.begun.remote(self.run))
        return begun

    def post(self, report: Report) -> None:
        self.actor.post.remote(self.run, report)

    def expect(self, label: str, total: int, unit: str) -> None:
        """Begins a count to which several workers add."""
        self.actor.expect.remote(self.run, label, total, unit)

    def advance(self, label: str, count: int, unit: str) -> None:
        self.actor.advance.remote(self.run, label, count, unit)

    def take(self) -> list[Report]:
        """The reports since the last time."""
        reports: list[Report] = ray.get(self.actor.take.remote(self.run))
        return reports


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressActor:
    """Collects the workers' reports, by run, until the driver takes them. All that it holds may be lost."""

    def __init__(self) -> None:
        self._reports: dict[str, list[Report]] = defaultdict(list)
        self._totals: dict[tuple[str, str, str], list[int]] = {}
        self._begun: dict[str, dict[str, str]] = defaultdict(dict)

    def begin(self, run: str, label: str, node_id: str) -> None:
        self._begun[run][label] = node_id

    def begun(self, run: str) -> dict[str, str]:
        return self._begun[run]

    def post(self, run: str, report: Report) -> None:
        self._reports[run].append(report)

    def expect(self, run: str, label: str, total: int, unit: str) -> None:
        self._totals[run, label, unit] = [0, total]
        self.post(run, Report(label, 0, total, unit))

    def advance(self, run: str, label: str, count: int, unit: str) -> None:
        of = self._totals.setdefault((run, label, unit), [0, count])
        of[0] = min(of[0] + count, of[1])  # a task that is run again counts again
        self.post(run, Report(label, of[0], of[1], unit))

    def take(self, run: str) -> list[Report]:
        return self._reports.pop(run, [])


@dataclass
class Report:
    """`completed` of `total` `unit`s of the work `label`, and (step, name → value) measured since the last report."""

    label: str
    completed: int
    total: int
    unit: str
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class Reporter:
    """A worker's side: posts at most every REPORT_EVERY_S, and at the end of a phase; with how busy the machine is."""

    def __init__(self, actor: RunProgress, label: str):
        self._board, self._label = actor, label
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._last = 0.0
        self._system = SystemSampler()

    def update(
        self, completed: int, total: int, unit: str, metrics: tuple[int, dict[str, float]] | None = None
    ) -> None:
        if metrics:
            self._metrics.append(metrics)
        if system := self._system.look(last=completed >= total):
            self._metrics.append(system)
        if time.monotonic() - self._last >= REPORT_EVERY_S or completed >= total:
            self._board.post(Report(self._label, completed, total, unit, self._metrics))
            self._metrics, self._last = [], time.monotonic()


class ProgressDisplay:
    """The driver's side. A context manager for one stage."""

    def __init__(self, console: Console, title: str):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._title = console, title
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._started: dict[tuple[str, str], tuple[float, int]] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> ProgressDisplay:
        self._console.print(f"[bold]{self._title}[/]")
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, report: Report) -> None:
        from rich.markup import escape

        key = (report.label, report.unit)
        now = time.monotonic()
        began, before = self._started.setdefault(key, (now, report.completed))
        # Reports that come at once, at the first look, tell no speed.
        rate = (report.completed - before) / (now - began) if now - began >= REPORT_EVERY_S else 0.0
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} {report.unit}/s" if rate else report.unit
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(escape(report.label), total=report.total, rate=speed)
        self._bars.update(self._tasks[key], completed=report.completed, total=report.total, rate=speed)
        pause = LOG_LINE_EVERY_S if now - began < LONG_LOG_LINE_EVERY_S else LONG_LOG_LINE_EVERY_S
        if not self._console.is_terminal and now - self._last_line.get(report.label, began) >= pause:
            self._last_line[report.label] = now
            left = f", {(report.total - report.completed) / rate:.0f} s left" if rate else ""
            self._console.print(
                f"  {report.label}: {report.completed} of {report.total} {report.unit}, {speed}{left}",
                markup=False,
                highlight=False,
            )
