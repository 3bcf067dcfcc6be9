"""Finished run, as read by a later job: config, trained adapter, results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import DamagedFile, file_digest, is_uri, read_record, split_location, write_record
from pipeline.prediction.options import GROUPED_ADAPTER
from pipeline.runtime.storage import Artifact, Storage

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter
    from pipeline.stages.plan import Plan

RUNS = "runs"
PROVENANCE = "artifacts.json"
GROUPING = "grouping.json"
SUMMARY, REPORT_PAGE = "report/summary.json", "report/report.html"
CONFIG = "config.yaml"
TABLES = ("report/predictions.parquet", "report/class_accuracy.parquet", "report/confusions.parquet")


@dataclass(frozen=True)
class FinishedRun:
    storage: Storage
    folder: Path
    snapshots: tuple[Artifact, ...]
    """Gradients of the tasks on the global prompt: from its training, then of each added task."""
    summary: dict[str, Any]
    """Content of summary.json."""

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


def write_provenance(plan: Plan, snapshots: Sequence[Artifact]) -> None:
    """Write to the run's folder the inputs of its snapshots, by which a later job finds them without the data, and the
    SHA-256 of its config and tables."""
    records = [{"stage": artifact.stage, "inputs": artifact.inputs} for artifact in snapshots]
    digests = {name: file_digest(plan.folder / name) for name in (CONFIG, *TABLES) if (plan.folder / name).is_file()}
    write_record(plan.folder / PROVENANCE, {"snapshots": records, "sha256_of_files": digests})


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
    snapshots = tuple(
        Artifact(storage, record["stage"], record["inputs"]) for record in read_record(folder / PROVENANCE)["snapshots"]
    )
    for artifact in snapshots:
        if not artifact.is_complete():
            raise UserError(
                f"--run {source} needs {storage.display_uri(artifact.folder)}, which is missing or damaged: rerun the "
                "command that made the run"
            )
    return FinishedRun(storage, folder, snapshots, summary)


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
