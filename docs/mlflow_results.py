"""Results of finished jobs, read from MLflow for paper_figures.ipynb.

Uses MLflow alone and no file of a storage, so it works on any machine that reaches the tracking server. A benchmark is
read from the report in its run's artifacts, which has the original task names and, unlike a search for the runs of a
method, never mixes runs with different options.
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
    """An experiment of an MLflow store, opened for reading."""

    client: MlflowClient
    name: str
    id: str

    def runs(self, search: str) -> list[Run]:
        """Return the runs that match a search, newest first."""
        return list(self.client.search_runs([self.id], search, max_results=10_000))

    def files(self, run: Run, folder: str) -> set[str]:
        with _readable(run):
            return {file.path for file in self.client.list_artifacts(run.info.run_id, folder)}

    def read(self, run: Run, path: str) -> str:
        with _readable(run), TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run.info.run_id, path, folder)).read_text()


def open_experiment(uri: str, name: str) -> Experiment:
    """Open an experiment; a relative database in `uri` is searched for in the working folder and its parents.

    Raises: UserError: the store or experiment does not exist or cannot be read.
    """
    if uri.startswith(SQLITE):
        uri = SQLITE + str(_database(uri))
    else:
        check_reachable(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = mlflow_client(uri)
        experiment = client.get_experiment_by_name(name)
        names = [known.name for known in client.search_experiments()]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read the MLflow store: {_first_line(error)}. Use another URI") from error
    if experiment is None:
        raise UserError(
            f"the MLflow store has no experiment {name!r}; it has: {', '.join(map(repr, names)) or 'none'}. Choose "
            "one of them or another store, or create it with mmap-clip benchmark --methods paper"
        )
    return Experiment(client, name, experiment.experiment_id)


def benchmark_runs(experiment: Experiment) -> list[Run]:
    """Return the benchmarks that have a report, newest first; their params are `name` (data), shots, seeds, methods."""
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
    """Read the newest benchmark with this name and data, restricted to these shots, seeds and methods; None means any.

    Raises: UserError: no benchmark or result matches.
    """
    runs = benchmark_runs(experiment)
    matching = [run for run in runs if name in (None, run.info.run_name) and data in (None, run.data.params["name"])]
    if not matching:
        available = ", ".join(f"{run.info.run_name} ({run.data.params['name']})" for run in runs) or "none"
        raise UserError(
            f"the experiment {experiment.name!r} has no benchmark{_filters(name=name, data=data)} with a report; it "
            f"has: {available}. Create one: mmap-clip benchmark --methods paper --shots 1 2 4 --seeds 1 2 3"
        )
    run, params = matching[0], matching[0].data.params
    benchmark = _parse_benchmark(
        params["name"],
        experiment.read(run, "benchmark/benchmark.csv"),
        experiment.read(run, "benchmark/benchmark.md"),
    )
    selected = [
        result
        for result in benchmark.results
        if (shots is None or result.shots in shots)
        and (seeds is None or result.seed in seeds)
        and (methods is None or result.method in methods)
    ]
    if not selected:
        raise UserError(
            f"the benchmark {run.info.run_name} has no result{_filters(shots=shots, seeds=seeds, methods=methods)}; it "
            f"has shots {params['shots']}; seeds {params['seeds']}; methods {params['methods']}. Choose among these, "
            "or run mmap-clip benchmark with more: it runs only what is missing"
        )
    return replace(benchmark, results=tuple(selected))


def read_grouping(
    experiment: Experiment,
    data: str | None = None,
    shots: Collection[int] | None = None,
    seeds: Collection[int] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Return the pipeline run's name and grouping.json of the newest grouping with this data, shots and seeds.

    Raises: UserError: no grouping matches.
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
    filters = _filters(data=data, shots=shots, seeds=seeds)
    raise UserError(
        f"the experiment {experiment.name!r} has no finished grouping{filters}. Create one: mmap-clip full-pipeline"
    )


def _parse_benchmark(name: str, table: str, report: str) -> Benchmark:
    """Parse the output of `benchmark_tables.to_csv` and the sentences at the head of benchmark.md."""
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


def _filters(**filters: str | Collection[int] | Collection[str] | None) -> str:
    """Describe filters for a message."""
    descriptions = [
        f"{name} {value if isinstance(value, str) else ', '.join(map(str, value))}"
        for name, value in filters.items()
        if value is not None
    ]
    return f" with {'; '.join(descriptions)}" if descriptions else ""


def _database(uri: str) -> Path:
    """Find a SQLite database. Raises: UserError: it does not exist; MLflow would create an empty one."""
    file = Path(uri.removeprefix(SQLITE))
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / file).is_file():
            return folder / file
    raise UserError(
        f"the MLflow database {file} does not exist: use the URI of yours, sqlite:////folder/mlflow.db or "
        "http://host:port, or create one with mmap-clip benchmark --methods paper"
    )


@contextmanager
def _readable(run: Run) -> Iterator[None]:
    """Raises: UserError: the run's artifacts cannot be read."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"cannot read the artifacts of the MLflow run {run.info.run_id}: {_first_line(error)}. Unless the server "
            "serves artifacts, this machine needs the same access to their bucket or folder as the machines that wrote "
            "them"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
