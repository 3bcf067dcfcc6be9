"""Finished run, as read by a later job: config, trained adapter, results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import DamagedFile, file_digest, is_uri, read_record, split_location, write_record
from pipeline.prediction.options import GROUPED_ADAPTER
from pipeline.runtime.storage import Artifact, Storage
from pipeline.stages.grouping_sources import SingleTasks

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter
    from pipeline.stages.plan import Plan

RUNS = "runs"
PROVENANCE = "artifacts.json"
GROUPING = "grouping.json"
SUMMARY, REPORT_PAGE = "report/summary.json", "report/report.html"
CONFIG = "config.yaml"
TABLES = tuple(f"report/{name}.parquet" for name in ("predictions", "class_accuracy", "confusions", "class_precision"))


@dataclass(frozen=True)
class FinishedRun:
    storage: Storage
    folder: Path
    snapshots: tuple[Artifact, ...]
    """Gradients of the tasks on the global prompt: from its training, then of each added task."""
    single_tasks: SingleTasks
    """Trainings of each task alone, and the losses of all training images under their prompts."""
    summary: dict[str, Any]
    """Content of summary.json."""

    def require(self, artifacts: Iterable[Artifact], source: str) -> None:
        """Check that artifacts exist. Raises: UserError: One is missing or damaged."""
        for artifact in artifacts:
            if not artifact.is_complete():
                raise UserError(
                    f"--run {source} needs {self.storage.display_uri(artifact.folder)}, which is missing or damaged: "
                    "rerun the command that made the run"
                )

    @cached_property
    def adapter(self) -> TrainedAdapter:
        """Adapter of grouped MmAP."""
        from pipeline.methods.adapter_file import load_adapter  # imports torch, which the check of options avoids

        return load_adapter(self.folder / GROUPED_ADAPTER)

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG

    @property
    def groups(self) -> list[list[str]]:
        groups: list[list[str]] = self.summary["groups"]
        return groups

    @property
    def tasks(self) -> list[str]:
        tasks: list[str] = self.summary["tasks"]
        return tasks


def write_provenance(plan: Plan, snapshots: Sequence[Artifact], single_tasks: SingleTasks) -> None:
    """Write to the run's folder the inputs of the artifacts that its affinities are from, by which a later job finds
    them without the data, and the SHA-256 of its config and tables."""
    records = {
        "snapshots": [_record(artifact) for artifact in snapshots],
        "adapters": {task: _record(artifact) for task, artifact in single_tasks.adapters.items()},
        "losses": [_record(artifact) for artifact in single_tasks.losses],
        "splits": [_record(artifact) for artifact in single_tasks.splits],
    }
    digests = {name: file_digest(plan.folder / name) for name in (CONFIG, *TABLES) if (plan.folder / name).is_file()}
    write_record(plan.folder / PROVENANCE, {**records, "sha256_of_files": digests})


def _record(artifact: Artifact) -> dict[str, Any]:
    return {"stage": artifact.stage, "inputs": artifact.inputs}


def check_unchanged(folder: Path, name: str) -> None:
    """Compare a file of a finished run with the SHA-256 in its PROVENANCE. Raises: DamagedFile: It was changed."""
    if file_digest(folder / name) != read_record(folder / PROVENANCE)["sha256_of_files"].get(name):
        raise DamagedFile(f"{folder / name} was changed since the run finished: rerun the command that made the run")


def run_config_file(folder: Path) -> Path:
    """Return the config of a run; of a finished one, after a check that it was not changed."""
    if (folder / PROVENANCE).is_file():
        check_unchanged(folder, CONFIG)
    return folder / CONFIG


def read_finished_run(source: str, cache: str) -> FinishedRun:
    """Read a finished run from `source`, <storage>/runs/<run> as a path or URI, with `cache` for a bucket's files.

    Raises:
        UserError: The folder does not exist, or the run is not finished.
    """
    storage, folder = resolve_run(source, cache)
    storage.download(folder)
    missing = [name for name in (CONFIG, SUMMARY, GROUPED_ADAPTER, PROVENANCE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"--run {source} is not a finished run ({missing[0]} is missing): give <storage>/{RUNS}/<run>, "
            "or rerun the command that made it, if it did not finish or is of an older version"
        )
    summary = read_record(folder / SUMMARY)
    if not all("test_loss" in method for method in summary["methods"].values()):
        raise UserError(f"--run {source} is of an older version, without test losses: rerun the command that made it")
    run_config_file(folder)
    records = read_record(folder / PROVENANCE)
    if "losses" not in records:
        raise UserError(
            f"--run {source} is of an older version, without losses of tasks trained alone: rerun the command that "
            "made the run"
        )

    def artifacts(name: str) -> tuple[Artifact, ...]:
        return tuple(Artifact(storage, record["stage"], record["inputs"]) for record in records[name])

    adapters = {
        task: Artifact(storage, record["stage"], record["inputs"]) for task, record in records["adapters"].items()
    }
    single_tasks = SingleTasks(adapters, artifacts("losses"), artifacts("splits"))
    finished = FinishedRun(storage, folder, artifacts("snapshots"), single_tasks, summary)
    finished.require(finished.snapshots + single_tasks.losses, source)
    return finished


def resolve_run(source: str, cache: str) -> tuple[Storage, Path]:
    """Return the storage, and the run's folder in it.

    Raises:
        UserError: `source` is not <storage>/runs/<run>, or does not exist.
    """
    path, options = split_location(source)
    root, _, name = path.rpartition(f"/{RUNS}/")
    if not root or "/" in name:
        raise UserError(f"--run {source} is not a run directory: give <storage>/{RUNS}/<run>")
    if not is_uri(source):
        if not Path(path).is_dir():
            raise UserError(f"--run {source} does not exist")
        return Storage.from_folder(Path(root)), Path(path)

    from pipeline.runtime.session import open_storage

    storage = open_storage(root + options, cache)
    return storage, storage.folder / RUNS / name
