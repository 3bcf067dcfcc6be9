"""Finished run, as read by a later job: config, trained adapter, results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import is_uri, read_json, write_json
from pipeline.prediction.options import GROUPED_ADAPTER
from pipeline.runtime.storage import Artifact, Storage

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter
    from pipeline.stages.plan import Plan

RUNS = "runs"
PROVENANCE = "artifacts.json"
GROUPING = "grouping.json"
SUMMARY, REPORT_PAGE = "report/summary.json", "report/report.html"


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
        return self.folder / "config.yaml"

    @property
    def groups(self) -> list[list[str]]:
        groups: list[list[str]] = self.summary["groups"]
        return groups

    @property
    def tasks(self) -> list[str]:
        tasks: list[str] = self.summary["tasks"]
        return tasks


def write_provenance(plan: Plan, snapshots: Sequence[Artifact]) -> None:
    """Write to the run's folder the inputs of its snapshots, by which a later job finds them without the data."""
    records = [{"stage": artifact.stage, "inputs": artifact.inputs} for artifact in snapshots]
    write_json(plan.folder / PROVENANCE, {"snapshots": records})


def read_finished_run(source: str, cache: str) -> FinishedRun:
    """Read a finished run from `source`, <storage>/runs/<run> as a path or URI, with `cache` for a bucket's files.

    Raises:
        UserError: The folder does not exist, or the run is not finished.
    """
    storage, folder = resolve_run(source, cache)
    storage.download(folder)
    missing = [name for name in ("config.yaml", SUMMARY, GROUPED_ADAPTER, PROVENANCE) if not (folder / name).is_file()]
    summary = {} if missing else read_json(folder / SUMMARY)
    if not missing and "num_test_images" not in summary:
        missing = [f"num_test_images in {SUMMARY}"]
    if missing:
        raise UserError(
            f"--run {source} is not a finished run ({missing[0]} is missing): give <storage>/{RUNS}/<run>, "
            "or rerun the command that made it, if it did not finish or is of an older version"
        )
    snapshots = tuple(
        Artifact(storage, record["stage"], record["inputs"]) for record in read_json(folder / PROVENANCE)["snapshots"]
    )
    for artifact in snapshots:
        if not artifact.is_complete():
            raise UserError(
                f"--run {source} needs {storage.display_uri(artifact.folder)}, which is missing: rerun the command "
                "that made the run"
            )
    return FinishedRun(storage, folder, snapshots, summary)


def resolve_run(source: str, cache: str) -> tuple[Storage, Path]:
    """Return the storage, and the run's folder in it.

    Raises:
        UserError: `source` is not <storage>/runs/<run>, or does not exist.
    """
    path, _, options = (
        source.partition("?") if is_uri(source) else (os.path.abspath(os.path.expanduser(source)), "", "")
    )
    root, _, name = path.rstrip("/").rpartition(f"/{RUNS}/")
    if not root or "/" in name:
        raise UserError(f"--run {source} is not a run directory: give <storage>/{RUNS}/<run>")
    if not is_uri(source):
        if not Path(path).is_dir():
            raise UserError(f"--run {source} does not exist")
        return Storage.from_folder(Path(root)), Path(path)

    from pipeline.runtime.session import open_storage

    storage = open_storage(root + (f"?{options}" if options else ""), cache)
    return storage, storage.folder / RUNS / name
