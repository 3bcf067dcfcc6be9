"""List of the runs in a storage, from the files of their folders; torch and Ray are not imported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import yaml
from rich.table import Table

from pipeline.config.files import parse_yaml
from pipeline.errors import UserError
from pipeline.files import parse_record
from pipeline.report.metrics import ACCURACY, metric_of
from pipeline.runtime.storage import existing_storage
from pipeline.stages.finished_run import CONFIG, GROUPING, PROVENANCE, RUNS, SUMMARY
from pipeline.stages.flow import NAMES, stage_title

STAGE_SECONDS = "stage_seconds.json"
SHOWN_METHODS = {"zero_shot": "zero-shot", "each_alone": "each alone", "all_in_one": "one group", "grouped": "grouped"}
"""Method → title of its column."""
MIN_WIDTH = 144
"""Columns of the table; a narrower terminal breaks its lines."""


@dataclass
class ListedRun:
    """Run of a storage, as far as its files say."""

    run: str
    """Path or URI of its folder."""
    folder_name: str
    changed: datetime | None = None
    """When its report was written, else its last stage or its config."""
    name: str = ""
    data: str = ""
    """Value of data.root."""
    tasks: Sequence[str] | None = None
    """None: all, which is not known before the grouping."""
    shots: str = ""
    seed: str = ""
    last_stage: str = ""
    """Last finished stage."""
    finished: bool = False
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Method → average test accuracy, or mAP, of the tasks, 0 to 1."""
    metric: str = ACCURACY
    """ACCURACY or MAP."""
    problem: str = ""
    """Why the folder cannot be read, if so."""

    @property
    def state(self) -> str:
        if self.problem:
            return self.problem
        return "finished" if self.finished else stage_title(self.last_stage) if self.last_stage else "started"


def list_runs(location: str, patterns: Sequence[str], limit: int | None) -> tuple[list[ListedRun], int]:
    """Return the runs of a storage, a folder or bucket, the newest first, and how many more than `limit` there are.

    Args:
        patterns: parts of the names of run folders, or names with wildcards, in any case; none: all.

    Raises:
        UserError: there is no such storage.
    """
    storage = existing_storage(location)
    filesystem, base = storage.filesystem(storage.folder)
    try:
        selector = pafs.FileSelector(f"{base}/{RUNS}", allow_not_found=True)
        infos = [info for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.Directory]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"storage={location} cannot be listed: {error}") from None
    names = [info.base_name for info in infos if _matches(info.base_name, patterns)]
    files = (SUMMARY, STAGE_SECONDS, CONFIG)
    stats = filesystem.get_file_info([f"{base}/{RUNS}/{name}/{file}" for name in names for file in files])
    runs = []
    for index, name in enumerate(names):
        times = [info.mtime for info in stats[3 * index : 3 * index + 3] if info.type == pafs.FileType.File]
        path = storage.display_uri(storage.folder / RUNS / name)
        runs.append(ListedRun(path, name, times[0] if times else None))
    oldest = datetime.fromtimestamp(0, UTC)
    runs.sort(key=lambda run: (run.changed or oldest, run.folder_name), reverse=True)
    listed = runs[:limit]
    for run in listed:
        try:
            _read(run, filesystem, f"{base}/{RUNS}/{run.folder_name}")
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            yaml.YAMLError,
            pa.ArrowException,
        ) as error:
            run.problem = run.problem or f"cannot be read: {' '.join(str(error).split())[:200]}"
    return listed, len(runs) - len(listed)


def run_table(runs: Sequence[ListedRun]) -> Table:
    """Return the runs as a table for the terminal, with accuracies in %."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("last change", no_wrap=True)
    table.add_column("run", no_wrap=True)  # to copy
    table.add_column("data", overflow="fold")
    for title in ("tasks", "shots", "seed", *SHOWN_METHODS.values()):
        table.add_column(title, justify="right")
    table.add_column("state", overflow="fold")
    for run in runs:
        unit = "" if run.metric == ACCURACY else f" {run.metric}"
        accuracies = [f"{100 * run.accuracy[name]:.1f}{unit}" if name in run.accuracy else "" for name in SHOWN_METHODS]
        tasks = "all" if run.tasks is None else str(len(run.tasks))
        when = run.changed.astimezone().strftime("%Y-%m-%d %H:%M") if run.changed else ""
        values = ["", "", "", ""] if run.problem else [run.data, tasks, run.shots, run.seed]
        table.add_row(when, run.folder_name, *values, *accuracies, run.state)
    return table


def to_json(run: ListedRun) -> dict[str, Any]:
    """Return what is known of a run; times in UTC."""
    return {
        "run": run.run,
        "name": run.name,
        "changed": run.changed.isoformat(timespec="seconds") if run.changed else None,
        "data": run.data,
        "tasks": run.tasks,
        "shots": int(run.shots) if run.shots.isdecimal() else None,
        "seed": int(run.seed) if run.seed.lstrip("-").isdecimal() else None,
        "finished": run.finished,
        "last_stage": run.last_stage or None,
        run.metric: dict(run.accuracy),
        "problem": run.problem or None,
    }


def _read(run: ListedRun, filesystem: pafs.FileSystem, folder: str) -> None:
    """Fill in what the files of a run say. Raises: an error of the file system or of a parser."""

    def read(name: str) -> bytes:
        try:
            with filesystem.open_input_file(f"{folder}/{name}") as stream:
                content: bytes = stream.read()
                return content
        except FileNotFoundError:
            return b""

    def read_values(name: str) -> dict[str, Any] | None:
        return parse_record(content, name) if (content := read(name)) else None

    if not (config_content := read(CONFIG)):
        run.problem = f"{CONFIG} is missing or empty"
        return
    provenance = read_values(PROVENANCE)
    if provenance and provenance["sha256_of_files"][CONFIG] != hashlib.sha256(config_content).hexdigest():
        run.problem = f"{CONFIG} was changed since the run finished: rerun the command that made it"
        return
    config = parse_yaml(str(config_content, "utf-8"), CONFIG)
    data = config["data"]
    run.name, run.data = config["name"], data["root"]
    run.shots, run.seed = data["shots"], config["seed"]
    if isinstance(data["tasks"], list):
        run.tasks = data["tasks"]
    if grouping := read_values(GROUPING):
        run.tasks = grouping["tasks"]
    if finished_stages := read_values(STAGE_SECONDS):
        run.last_stage = next((name for name in reversed(NAMES) if name in finished_stages), "")
    if summary := read_values(SUMMARY):
        run.tasks = summary["tasks"]
        run.accuracy = {name: float(method["average"]) for name, method in summary["methods"].items()}
        run.metric = metric_of(next(iter(summary["methods"].values())))
        run.finished, run.last_stage = True, NAMES[-1]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    wildcards = [pattern if set("*?[") & set(pattern) else f"*{pattern}*" for pattern in map(str.lower, patterns)]
    return not patterns or any(fnmatchcase(name.lower(), pattern) for pattern in wildcards)
