"""Results of finished jobs, read back from MLflow.

What this module chose:
- Only MLflow is asked, no file of a storage, so it works on any machine that reaches the tracking server.
- A benchmark is read from the report that its job left among its run's artefacts: it has the tasks' own names, and
  never mixes runs of different options, as a search for runs of the same method could.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.report.benchmark_tables import Benchmark, Result
from pipeline.runtime.tracking import CLIENT_DEFAULTS, check_reachable

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

REPORT = "benchmark"
"""Folder of a benchmark's artefacts."""
SQLITE = "sqlite:///"
NO_PROGRESS_BARS = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


@dataclass(frozen=True)
class Experiment:
    """An experiment of an MLflow store, to read from."""

    client: MlflowClient
    name: str
    id: str


@dataclass(frozen=True)
class BenchmarkRun:
    """A benchmark's MLflow run; `shots`, `seeds` and `methods` as its job was given them."""

    name: str
    run_id: str
    data: str
    shots: str
    seeds: str
    methods: str


def open_experiment(uri: str, name: str) -> Experiment:
    """Args: uri: a relative database is looked for in the working folder and in those above it.

    Raises: UserError: no such store or experiment, or it cannot be read.
    """
    if uri.startswith(SQLITE):
        uri = SQLITE + str(_database(uri))
    else:
        check_reachable(uri)
    for variable, value in (CLIENT_DEFAULTS | NO_PROGRESS_BARS).items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
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


def benchmark_runs(experiment: Experiment) -> Iterator[BenchmarkRun]:
    """Those that have their report, the newest first."""
    for run in _runs(experiment, "tags.level = 'benchmark'"):
        if f"{REPORT}/benchmark.csv" in _artefacts(experiment, run.info.run_id, REPORT):
            params = run.data.params
            shots, seeds, methods = params["shots"], params["seeds"], params["methods"]
            yield BenchmarkRun(run.data.tags["benchmark"], run.info.run_id, params["name"], shots, seeds, methods)


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
    found = list(benchmark_runs(experiment))
    fits = [run for run in found if name in (None, run.name) and data in (None, run.data)]
    if not fits:
        there = ", ".join(f"{run.name} ({run.data})" for run in found) or "none"
        raise UserError(
            f"the experiment {experiment.name!r} has no benchmark{_asked(name=name, data=data)} with a report; it has: "
            f"{there}. To make one: python jobs/benchmark.py --methods paper --shots 1 2 4 --seeds 1 2 3"
        )
    run_id = fits[0].run_id
    benchmark = _benchmark(
        fits[0].data,
        _read(experiment, run_id, f"{REPORT}/benchmark.csv"),
        _read(experiment, run_id, f"{REPORT}/benchmark.md"),
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
            f"the benchmark {fits[0].name} has no result{_asked(shots=shots, seeds=seeds, methods=methods)}; it has "
            f"shots {fits[0].shots}; seeds {fits[0].seeds}; methods {fits[0].methods}. Choose among these, or run "
            "jobs/benchmark.py with more: it does only what is missing"
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
    for stage in _runs(experiment, "tags.stage = 'grouping' AND attributes.status = 'FINISHED'"):
        parent = experiment.client.get_run(stage.data.tags["mlflow.parentRunId"])
        params, run_id = parent.data.params, stage.info.run_id
        fits = (
            data in (None, params["name"])
            and (shots is None or int(params["data.shots"]) in shots)
            and (seeds is None or int(params["seed"]) in seeds)
        )
        if fits and "grouping.json" in _artefacts(experiment, run_id):
            grouping: dict[str, Any] = json.loads(_read(experiment, run_id, "grouping.json"))
            return parent.data.tags["mlflow.runName"], grouping
    asked = _asked(data=data, shots=shots, seeds=seeds)
    raise UserError(
        f"the experiment {experiment.name!r} has no finished grouping{asked}. To make one: python jobs/full_pipeline.py"
    )


def _benchmark(name: str, table: str, report: str) -> Benchmark:
    """From `benchmark_tables.to_csv`, and the sentences at the head of benchmark.md."""
    results: dict[tuple[str, int, int], Result] = {}
    for row in csv.DictReader(io.StringIO(table)):
        method, shots, seed = row["method"], int(row["shots"]), int(row["seed"])
        result = results.setdefault(
            (method, shots, seed), Result(method, shots, seed, {}, int(row["trained_parameters"]))
        )
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


def _runs(experiment: Experiment, search: str) -> Iterator[mlflow.entities.Run]:
    """The newest first."""
    token = None
    while True:
        page = experiment.client.search_runs(
            [experiment.id], search, order_by=["attributes.start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _artefacts(experiment: Experiment, run_id: str, folder: str | None = None) -> set[str]:
    try:
        return {file.path for file in experiment.client.list_artifacts(run_id, folder)}
    except Exception as error:
        raise _unreadable(run_id, error) from error


def _read(experiment: Experiment, run_id: str, path: str) -> str:
    try:
        with TemporaryDirectory() as folder:
            return Path(experiment.client.download_artifacts(run_id, path, folder)).read_text()
    except Exception as error:
        raise _unreadable(run_id, error) from error


def _unreadable(run_id: str, error: Exception) -> UserError:
    return UserError(
        f"the artefacts of the MLflow run {run_id} cannot be read: {_first_line(error)}. Where the server does not "
        "hand them out itself, this machine needs the same access to their bucket or folder as those that made them"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
