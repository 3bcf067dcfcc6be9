"""Runs in a storage, as objects for notebooks and scripts: settings, groups, accuracies, files, trained models."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, load_yaml, parse_config
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.grouping.text import format_groups
from pipeline.runtime.storage import Storage, is_uri
from pipeline.stages.finished_run import GROUPING, RUNS, SUMMARY, resolve_run

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.data.findings import Finding
    from pipeline.prediction.image_sources import ImageSource
    from pipeline.prediction.model import TrainedModel
    from pipeline.report.data_check import TaskOverview


@dataclass(frozen=True)
class Run:
    """A run of the pipeline, finished or not; `pipeline.fit` and `pipeline.open_run` return it.

    A property whose stage has not run yet raises a UserError.
    """

    storage: Storage
    folder: Path
    """The run directory, <storage>/runs/<name>-<key>; with a bucket, its local copy."""

    @property
    def uri(self) -> str:
        """Path or URI of the run directory, as other commands take it."""
        return self.storage.display_uri(self.folder)

    @cached_property
    def config(self) -> Config:
        """All settings."""
        return parse_config(load_yaml(self.folder / "config.yaml"))

    @property
    def is_finished(self) -> bool:
        """True if the run has its report."""
        return (self.folder / SUMMARY).is_file()

    @property
    def findings(self) -> list[Finding]:
        """Findings of the data check, errors first."""
        return self._data_check()[0]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        tasks: list[str]
        if (self.folder / GROUPING).is_file():
            tasks = self.grouping["tasks"]
        else:
            tasks = [overview.task for overview in self._data_check()[1]]
        return tasks

    @property
    def grouping(self) -> dict[str, Any]:
        """Result of the grouping: tasks, groups, score, is_optimal, affinity, stability and more, as plain values."""
        return self._read(GROUPING, "grouping")

    @property
    def groups(self) -> list[list[str]]:
        """Tasks by group."""
        groups: list[list[str]] = self.grouping["groups"]
        return groups

    @property
    def affinities(self) -> pd.DataFrame:
        """Affinity of each two tasks, (T, T); index and columns are the tasks."""
        import pandas as pd

        grouping = self.grouping
        return pd.DataFrame(grouping["affinity"], grouping["tasks"], grouping["tasks"])

    @property
    def summary(self) -> dict[str, Any]:
        """Content of report/summary.json: methods, groups, seconds of the stages, warnings and more."""
        return self._read(SUMMARY, "report")

    @property
    def accuracy(self) -> pd.DataFrame:
        """Test accuracy, 0 to 1: a row per task, a column per method."""
        import pandas as pd

        summary = self.summary
        columns = {name: method["accuracy"] for name, method in summary["methods"].items()}
        return pd.DataFrame(columns, index=summary["tasks"])

    @property
    def warnings(self) -> list[str]:
        """Warnings of the report, such as groups that are uncertain."""
        warnings: list[str] = self.summary["warnings"]
        return warnings

    @property
    def report(self) -> Path:
        """Folder of the report: tables, figures, pages."""
        return self._file(SUMMARY, "report").parent

    @property
    def adapters(self) -> dict[str, Path]:
        """Method → its adapter file, for `pipeline.load`."""
        self._file(SUMMARY, "report")
        return {file.stem: file for file in sorted((self.folder / "adapters").glob("*.safetensors"))}

    def load(self, method: str = "grouped", **options: Any) -> TrainedModel:
        """Load the model of a method; `options` are those of `pipeline.load`.

        Raises:
            UserError: the run has no adapter of this method.
        """
        from pipeline.prediction.load import load_model

        adapters = self.adapters
        if method not in adapters:
            raise UserError(f"{self.uri} has no adapter of {method!r}; it has: {', '.join(adapters)}")
        return load_model(adapters[method], **options)

    @cached_property
    def model(self) -> TrainedModel:
        """Model of grouped MmAP, loaded on first use."""
        return self.load()

    def predict(self, images: ImageSource | Iterable[ImageSource], task: str | None = None) -> Any:
        """Classify images with `model`; see `TrainedModel.predict`."""
        return self.model.predict(images, task)

    def __repr__(self) -> str:
        lines = [f"Run({self.uri!r})"]
        if (self.folder / GROUPING).is_file():
            lines.append(f"  groups: {format_groups(self.groups)}")
        if not self.is_finished:
            return "\n".join([*lines, "  not finished"])
        averages = ", ".join(
            f"{name} {100 * method['average']:.1f}" for name, method in self.summary["methods"].items()
        )
        return "\n".join([*lines, f"  {self._table_title()}, average: {averages}"])

    def _repr_html_(self) -> str:
        rows = [f"<b>{escape(self.config.name)}</b>"]
        if self.is_finished:
            table = (100 * self.accuracy).round(1)
            table.loc["average"] = [round(100 * method["average"], 1) for method in self.summary["methods"].values()]
            rows[0] += f": {self._table_title()}"
            rows.append(table.to_html())
        if (self.folder / GROUPING).is_file():
            rows.append(f"Groups: {escape(format_groups(self.groups))}")
        rows.append(f"{'Report' if self.is_finished else 'Not finished'}: <code>{escape(self.uri)}</code>")
        return "".join(f"<div>{row}</div>" for row in rows)

    def _table_title(self) -> str:
        return f"{self.config.data.shots}-shot test accuracy (%), seed {self.config.seed}"

    def _data_check(self) -> tuple[list[Finding], list[TaskOverview]]:
        from pipeline.stages.data_check import FINDINGS, NAME, read_results  # Ray takes seconds to import

        results = read_results(self._file(f"{NAME}/{FINDINGS}", "data check"))
        if results is None:
            raise UserError(f"the data check of {self.uri} is of another version: run it again with pipeline.check")
        return results

    def _read(self, name: str, stage: str) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self._file(name, stage))
        return content

    def _file(self, name: str, stage: str) -> Path:
        """Return a file of the run. Raises: UserError: The stage that writes it has not run."""
        if not (file := self.folder / name).is_file():
            raise UserError(
                f"{self.uri} has no {stage} yet: finish the run with pipeline.fit, or mmap-clip full-pipeline, with "
                "its settings"
            )
        return file


def open_run(source: str | os.PathLike[str]) -> Run:
    """Open an existing run, finished or not: <storage>/runs/<run> as a path or URI.

    Raises:
        UserError: there is no such run.
    """
    storage, folder = resolve_run(os.fspath(source), Config().cache)
    storage.download(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{source} is not a run directory (config.yaml is missing): give <storage>/{RUNS}/<run>")
    return Run(storage, folder)


def list_runs(location: str | os.PathLike[str]) -> list[Run]:
    """Return the runs of a storage folder, the one that was started last first.

    Raises:
        UserError: there is no such folder, or it is a bucket.
    """
    if is_uri(os.fspath(location)):
        raise UserError(f"runs in a bucket are not listed: open one of them, {location}/{RUNS}/<run>")
    folder = Path(location).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"storage={location} does not exist")
    configs = [file for file in (folder / RUNS).glob("*/config.yaml") if file.is_file()]
    configs.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return [Run(Storage.from_folder(folder), file.parent) for file in configs]
