"""Concurrent runs on one cluster that differ in shots and seed.

Each run plans its stages in a thread of the driver, and Ray schedules the work of all, several trainings per device if
cluster.gpus_per_worker allows it. Finished artifacts are cached by their hash, so repeated or additional runs do only
what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import Config, parse_config
from pipeline.data.names import pluralize
from pipeline.interrupts import set_resume_point
from pipeline.runtime.cluster import WorkerResources
from pipeline.runtime.session import Session
from pipeline.stages.plan import Plan, make_plan
from pipeline.stages.run import run_session


def expand_configs(base: Config, shots: Sequence[int], seeds: Sequence[int]) -> list[Config]:
    """Return one config per run, ordered by shots, then seeds. Raises: UserError: an invalid value."""
    values = base.model_dump()
    return [
        parse_config(values | {"seed": seed, "data": values["data"] | {"shots": num_shots}})
        for num_shots in sorted(shots)
        for seed in seeds
    ]


def make_plans(configs: Sequence[Config], console: Console, variants: Sequence[str] | None = None) -> list[Plan]:
    """Return a plan per config; `variants` as of `make_plan`. Raises: UserError: the first error, before any work."""
    console.print(f"[bold]{configs[0].name}[/]: checking {pluralize(len(configs), 'run')}", highlight=False)
    first_plan = make_plan(configs[0], _RunConsole(configs[0]), variants=variants)
    return [first_plan, *(make_plan(config, _RunConsole(config), reuse_checks_of=first_plan) for config in configs[1:])]


def map_concurrently(
    plans: Sequence[Plan], connect: Callable[[], WorkerResources], work: Callable[[Plan, Session], Any]
) -> Iterator[tuple[Plan, Any]]:
    """Yield each plan with the result of `work`, or the exception that ended it, in the order of the plans. All run
    concurrently, each in its own session; an interruption of the caller cancels them."""
    connect()  # not in a thread, where Ray cannot be interrupted while it starts
    cancelled = threading.Event()

    def run(plan: Plan) -> Any:
        with run_session(plan, connect, _RunConsole(plan.config), cancelled) as session:
            return work(plan, session)

    with ThreadPoolExecutor(len(plans), "run") as threads:
        futures: list[Future[Any]] = []
        try:
            futures += [threads.submit(run, plan) for plan in plans]
            for plan, future in zip(plans, futures):
                error = future.exception()
                if error:
                    _RunConsole(plan.config).print(f"[bold red]failed:[/] {escape(str(error))}")
                yield plan, error or future.result()
        except BaseException:
            cancelled.set()
            unfinished = len(plans) - sum(future.done() and not future.exception() for future in futures)
            set_resume_point(f"the {unfinished} of {pluralize(len(plans), 'run')} that have not finished")
            raise


class _RunConsole(Console):
    """Console whose lines begin with the name of the run."""

    def __init__(self, config: Config):
        super().__init__(soft_wrap=True, force_terminal=False, highlight=False)
        self._run = f"{pluralize(config.data.shots, 'shot')}, seed {config.seed}:"

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(self._run, *objects, **options)
