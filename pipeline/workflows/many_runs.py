"""Runs that differ in shots and seed, at work on one cluster at once.

Each plans its own stages in a thread of the driver, and Ray places all their work, several trainings to a device where
cluster.gpus_per_worker lets them fit. What is finished is found by its hash, so the same runs again, or more of them,
do only what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import Config, parse_config
from pipeline.runtime.cluster import WorkerResources
from pipeline.runtime.session import Session
from pipeline.stages.plan import Plan, make_plan
from pipeline.stages.run import run_session


def configs_of(base: Config, shots: Sequence[int], seeds: Sequence[int]) -> list[Config]:
    """One a run: the fewest shots first, all seeds of them. Raises: UserError: a value that cannot be."""
    values = base.model_dump()
    return [
        parse_config(values | {"seed": seed, "data": values["data"] | {"shots": of_run}})
        for of_run in sorted(shots)
        for seed in seeds
    ]


def make_plans(configs: Sequence[Config], console: Console) -> list[Plan]:
    """Raises: UserError: the first thing that is wrong, before any work."""
    console.print(f"[bold]{configs[0].name}[/]: checking {len(configs)} runs", highlight=False)
    first = make_plan(configs[0], _RunConsole(configs[0]))
    return [first, *(make_plan(config, _RunConsole(config), reuse_checks_of=first) for config in configs[1:])]


def map_concurrently(
    plans: Sequence[Plan], worker_resources: WorkerResources, work: Callable[[Plan, Session], Any]
) -> Iterator[tuple[Plan, Any]]:
    """Each plan with what `work` gave, or the exception that ended it, in the order of the plans; all are at work from
    the start, each in a session of its own. What interrupts the caller ends them."""
    cancelled = threading.Event()

    def carry_out(plan: Plan) -> Any:
        with run_session(plan, worker_resources, _RunConsole(plan.config), cancelled) as session:
            return work(plan, session)

    with ThreadPoolExecutor(len(plans), "run") as threads:
        futures = [threads.submit(carry_out, plan) for plan in plans]
        try:
            for plan, future in zip(plans, futures):
                error = future.exception()
                if error:
                    _RunConsole(plan.config).print(f"[bold red]failed:[/] {escape(str(error))}")
                yield plan, error or future.result()
        except BaseException:
            cancelled.set()
            raise


class _RunConsole(Console):
    """Lines that say which run they are of."""

    def __init__(self, config: Config):
        super().__init__(soft_wrap=True, force_terminal=False, highlight=False)
        self._run = f"{config.data.shots} shots, seed {config.seed}:"

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(self._run, *objects, **options)
