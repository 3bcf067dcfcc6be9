"""Reads the results of finished jobs from MLflow, for paper_figures.ipynb beside it.

Only MLflow is asked, no file of a storage, so it works on any machine that reaches the tracking server. A benchmark is
read from the report that its job left among its run's artifacts: it has the tasks' own names, and never mixes runs of
different options, as a search for runs of the same method could.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.report.benchmark_tables import Benchmark, Result
from pipeline.runtime.tracking.mlflow_adapter import check_reachable, mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Experiment:
    """An experiment of an MLflow store, to read from."""

    client: MlflowClient
    name: str
    id: str

    def runs(self, search: str) -> list[Run]:
        """The newest first."""
        return list(self.client.search_runs([self.id], search, max_results=10_000))

    def files(self, run: Run, folder: str) -> set[str]:
        with _readable(run):
            return {file.path for file in self.client.list_artifacts(run.info.run_id, folder)}

    def read(self, run: Run, path: str) -> str:
        with _readable(run), TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run.info.run_id, path, folder)).read_text()


def open_experiment(uri: str, name: str) -> Experiment:
    """Args: uri: a relative database is looked for in the working folder and in those above it.

    Raises: UserError: no such store or experiment, or it cannot be read.
    """
    if uri.startswith(SQLITE):
        uri = SQLITE + str(_database(uri))
    else:
        check_reachable(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = mlflow_client(uri)
        found = client.get_experiment_by_name(name)
        others = [experiment.name for experiment in client.search_experiments()]
    except Exception as error:
        raise UserError(f"the MLflow store cannot be read: {_first_line(error)}. Give another address") from error
    if found is None:
        raise UserError(
            f"the MLflow store has no experiment {name!r}; it has: {', '.join(map(repr, others)) or 'none'}. Choose "
            "one of them, or another store. A job makes the experiment: python jobs/benchmark.py --methods paper"
        )
    return Experiment(client, name, found.experiment_id)


def benchmark_runs(experiment: Experiment) -> list[Run]:
    """Those that have their report, the newest first; their params have data (`name`), shots, seeds and methods."""
    runs = experiment.runs("tags.level = 'benchmark'")
    return [run for run in runs if "benchmark/benchmark.csv" in experiment.files(run, "benchmark")]


def read_benchmark(
    experiment: Experiment,
    name: str | None = None,
    data: str | None = None,
    shots: Collection[int] | None = None,
    seeds: Collection[int] | None = None,
    methods: Collection[str] | None = None,
) -> Benchmark:
    """What the newest benchmark of this name and data found, of these shots, seeds and methods; None: of any.

    Raises: UserError: there is none.
    """
    runs = benchmark_runs(experiment)
    fits = [run for run in runs if name in (None, run.info.run_name) and data in (None, run.data.params["name"])]
    if not fits:
        there = ", ".join(f"{run.info.run_name} ({run.data.params['name']})" for run in runs) or "none"
        raise UserError(
            f"the experiment {experiment.name!r} has no benchmark{_asked(name=name, data=data)} with a report; it has: "
            f"{there}. To make one: python jobs/benchmark.py --methods paper --shots 1 2 4 --seeds 1 2 3"
        )
    run, params = fits[0], fits[0].data.params
    benchmark = _benchmark(
        params["name"],
        experiment.read(run, "benchmark/benchmark.csv"),
        experiment.read(run, "benchmark/benchmark.md"),
    )
    chosen = [
        result
        for result in benchmark.results
        if (shots is None or result.shots in shots)
        and (seeds is None or result.seed in seeds)
        and (methods is None or result.method in methods)
    ]
    if not chosen:
        raise UserError(
            f"the benchmark {run.info.run_name} has no result{_asked(shots=shots, seeds=seeds, methods=methods)}; it "
            f"has shots {params['shots']}; seeds {params['seeds']}; methods {params['methods']}. Choose among these, "
            "or run jobs/benchmark.py with more: it does only what is missing"
        )
    return replace(benchmark, results=tuple(chosen))


def read_grouping(
    experiment: Experiment,
    data: str | None = None,
    shots: Collection[int] | None = None,
    seeds: Collection[int] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The newest grouping of this data, of one of these shots and seeds: its pipeline run's name, and grouping.json.

    Raises: UserError: there is none.
    """
    for stage in experiment.runs("tags.stage = 'grouping' AND attributes.status = 'FINISHED'"):
        parent = experiment.client.get_run(stage.data.tags["mlflow.parentRunId"])
        params = parent.data.params
        if (
            data in (None, params["name"])
            and (shots is None or int(params["data.shots"]) in shots)
            and (seeds is None or int(params["seed"]) in seeds)
        ):
            return parent.info.run_name, json.loads(experiment.read(stage, "grouping.json"))
    asked = _asked(data=data, shots=shots, seeds=seeds)
    raise UserError(
        f"the experiment {experiment.name!r} has no finished grouping{asked}. To make one: python jobs/full_pipeline.py"
    )


def _benchmark(name: str, table: str, report: str) -> Benchmark:
    """From `benchmark_tables.to_csv`, and the sentences at the head of benchmark.md."""
    results: dict[tuple[str, int, int], Result] = {}
    for row in csv.DictReader(io.StringIO(table)):
        run = row["method"], int(row["shots"]), int(row["seed"])
        result = results.setdefault(run, Result(*run, {}, int(row["trained_parameters"])))
        result.accuracy[row["task"]] = float(row["accuracy"])
    tasks = dict.fromkeys(task for result in results.values() for task in result.accuracy)
    head = report.partition("\n### ")[0].splitlines()
    clip, *protocol = [line.removeprefix("- ") for line in head if line.startswith("- ")]
    clip = clip.removeprefix("CLIP: ").removesuffix(".")
    return Benchmark(name, tuple(tasks), tuple(results.values()), clip, tuple(protocol))


def _asked(**wanted: str | Collection[int] | Collection[str] | None) -> str:
    """What was asked for, for a message."""
    given = [
        f"{what} {value if isinstance(value, str) else ', '.join(map(str, value))}"
        for what, value in wanted.items()
        if value is not None
    ]
    return f" of {'; '.join(given)}" if given else ""


def _database(uri: str) -> Path:
    """Raises: UserError: there is none. MLflow would make an empty one."""
    file = Path(uri.removeprefix(SQLITE))
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / file).is_file():
            return folder / file
    raise UserError(
        f"there is no MLflow database {file}: give the address of yours, sqlite:////folder/mlflow.db or "
        "http://host:port, or make one with python jobs/benchmark.py --methods paper"
    )


@contextmanager
def _readable(run: Run) -> Iterator[None]:
    """Raises: UserError: the run's artifacts cannot be read."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the artifacts of the MLflow run {run.info.run_id} cannot be read: {_first_line(error)}. Where the server "
            "does not hand them out itself, this machine needs the same access to their bucket or folder as those that "
            "made them"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
