"""Runs that differ in shots and seed, at work on one cluster at once.

Each plans its own stages in a thread of the driver, and Ray places all their work, several trainings to a device where
cluster.gpus_per_training lets them fit. What is finished is found by its hash, so the same runs again, or more of them,
do only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import Config, parse_config
from pipeline.runtime.run import Run, check_run


def configs_of(base: Config, shots: Sequence[int], seeds: Sequence[int]) -> list[Config]:
    """One a run: the fewest shots first, all seeds of them. Raises: UserError: a value that cannot be."""
    values = base.model_dump()
    return [
        parse_config(values | {"seed": seed, "data": values["data"] | {"shots": of_run}})
        for of_run in sorted(shots)
        for seed in seeds
    ]


def checked_runs(configs: Sequence[Config], console: Console) -> list[Run]:
    """Raises: UserError: the first thing that is wrong, before any work."""
    console.print(f"[bold]{configs[0].name}[/]: checking {len(configs)} runs", highlight=False)
    first = check_run(configs[0], _RunConsole(configs[0]))
    return [first, *(check_run(config, _RunConsole(config), like=first) for config in configs[1:])]


def in_parallel(runs: Sequence[Run], work: Callable[[Run], Any]) -> Iterator[tuple[Run, Any]]:
    """Each run with what `work` gave, or the exception that ended it, in the order of the runs; all are at work from
    the start. What interrupts the caller ends them."""
    with ThreadPoolExecutor(len(runs), "run") as threads:
        futures = [threads.submit(work, run) for run in runs]
        try:
            for run, future in zip(runs, futures):
                error = future.exception()
                if error:
                    run.console.print(f"[bold red]failed:[/] {escape(str(error))}")
                yield run, error or future.result()
        except BaseException:
            for run in runs:
                run.stop.set()
            raise


class _RunConsole(Console):
    """Lines that say which run they are of."""

    def __init__(self, config: Config):
        super().__init__(soft_wrap=True, force_terminal=False, highlight=False)
        self._run = f"{config.data.shots} shots, seed {config.seed}:"

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(self._run, *objects, **options)
