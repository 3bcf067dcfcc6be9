"""Runs in a storage, as objects for notebooks and scripts: settings, groups, accuracies, files, trained models."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, load_yaml, parse_config
from pipeline.errors import UserError
from pipeline.files import read_record
from pipeline.grouping.text import format_groups
from pipeline.report.metrics import ACCURACY, MAP, metric_of
from pipeline.runtime.storage import Storage
from pipeline.stages.finished_run import (
    CONFIG,
    GROUPING,
    PROVENANCE,
    REPORT_PAGE,
    RUNS,
    SUMMARY,
    check_unchanged,
    resolve_run,
    run_config_file,
)

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.data.findings import Finding
    from pipeline.prediction.image_sources import ImageSource
    from pipeline.prediction.model import TrainedModel
    from pipeline.report.data_check import TaskOverview

log = logging.getLogger(__name__)


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
        return parse_config(load_yaml(run_config_file(self.folder)))

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
    def metric(self) -> str:
        """Metric of the results: `accuracy`, or `mAP` where images may have several labels."""
        return metric_of(next(iter(self.summary["methods"].values())))

    @property
    def accuracy(self) -> pd.DataFrame:
        """Test accuracy, 0 to 1: a row per task, a column per method. Raises: UserError: the run has mAPs."""
        if self.metric != ACCURACY:
            raise UserError(f"the results of {self.uri} are mAPs: use mean_average_precision")
        return self._by_task_and_method(ACCURACY)

    @property
    def mean_average_precision(self) -> pd.DataFrame:
        """Test mAP, 0 to 1: a row per task, a column per method. Raises: UserError: the run has accuracies."""
        if self.metric != MAP:
            raise UserError(f"the results of {self.uri} are accuracies: use accuracy")
        return self._by_task_and_method(MAP)

    @property
    def standard_error(self) -> pd.DataFrame:
        """Standard error of each accuracy, from the number of test images, or of each mAP, by the jackknife."""
        return self._by_task_and_method("standard_error")

    @property
    def test_loss(self) -> pd.DataFrame:
        """Mean cross-entropy over the test images in nats: a row per task, a column per method."""
        return self._by_task_and_method("test_loss")

    @property
    def predictions(self) -> pd.DataFrame:
        """A row per test image and method: path, task, method, true_label, label, probability (0 to 1), loss (nats);
        with several labels true_labels, labels, and probabilities by class."""
        return self._table("predictions")

    @property
    def class_accuracy(self) -> pd.DataFrame:
        """A row per method, task and class: label, number of test images, how many of them are correct."""
        return self._table("class_accuracy")

    @property
    def class_precision(self) -> pd.DataFrame:
        """A row per method, task and class, where images may have several: label, number of test images, average
        precision."""
        return self._table("class_precision")

    def confusion_matrix(self, task: str, method: str = "grouped") -> pd.DataFrame:
        """Return the number of test images by true class (rows) and predicted class (columns), (C, C).

        Raises:
            UserError: unknown task or method.
        """
        confusions, classes = self._table("confusions"), self._table("class_accuracy")
        for name, value in (("task", task), ("method", method)):
            if value not in (valid := confusions[name].unique().tolist()):
                raise UserError(f"unknown {name} {value!r}; the run has: {', '.join(valid)}")
        confusions, classes = (
            table[(table["task"] == task) & (table["method"] == method)] for table in (confusions, classes)
        )
        labels = classes["label"]
        matrix = confusions.pivot(index="true_label", columns="label", values="images")
        return matrix.reindex(index=labels, columns=labels).fillna(0).astype(int).rename_axis("true label")

    @property
    def warnings(self) -> list[str]:
        """Warnings of the report, such as groups that are uncertain."""
        warnings: list[str] = self.summary["warnings"]
        return warnings

    @property
    def conclusion(self) -> str:
        """Sentence of the report on what follows: train each task alone, all in one group, or the groups found."""
        conclusion: str = self.summary["conclusion"]
        return conclusion

    @property
    def report(self) -> Path:
        """The report, an HTML page; in its folder are figures and tables."""
        return self._file(REPORT_PAGE, "report")

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
        parts = [self._location()]
        if (self.folder / GROUPING).is_file():
            parts.append(format_groups(self.groups))
        if self.is_finished:
            methods = self.summary["methods"]
            averages = (f"{name} {100 * method['average']:.1f}" for name, method in methods.items())
            parts.append(f"average {self.metric} (%) {', '.join(averages)}")
        else:
            parts.append("not finished")
        return f"<Run {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        parts = [f"<b>{escape(self.config.name)}</b>"]
        if self.is_finished:
            parts[0] += f": {self._table_title()} ± standard error"
            parts.append(self._accuracy_cells().to_html())
            parts.append(escape(self.conclusion))
        if (self.folder / GROUPING).is_file():
            parts.append(f"Groups: {escape(format_groups(self.groups))}")
        path = f"{self._location()}/{REPORT_PAGE if self.is_finished else ''}"
        parts.append(f"{'Report' if self.is_finished else 'Not finished'}: <code>{escape(path)}</code>")
        return "".join(f"<div>{part}</div>" for part in parts)

    def _accuracy_cells(self) -> pd.DataFrame:
        """Return the table of accuracies or mAPs and their average, as text."""
        accuracy, errors = self._by_task_and_method(self.metric), self.standard_error
        for name, method in self.summary["methods"].items():
            accuracy.loc["average", name] = method["average"]
            errors.loc["average", name] = method["average_standard_error"]
        return (100 * accuracy).map("{:.1f}".format) + (100 * errors).map(" ± {:.1f}".format)

    def _location(self) -> str:
        """Return the path or URI of the run directory, relative to the working directory if it is below."""
        if not self.storage.is_bucket and self.folder.is_relative_to(Path.cwd()):
            return str(self.folder.relative_to(Path.cwd()))
        return self.uri

    def _table_title(self) -> str:
        return f"{self.config.data.shots}-shot test {self.metric} (%), seed {self.config.seed}"

    def _data_check(self) -> tuple[list[Finding], list[TaskOverview]]:
        from pipeline.stages.data_check import FINDINGS, NAME, read_results  # Ray takes seconds to import

        results = read_results(self._file(f"{NAME}/{FINDINGS}", "data check"))
        if results is None:
            raise UserError(
                f"the data check of {self.uri} is damaged, or of another version: run it again with pipeline.check"
            )
        return results

    def _by_task_and_method(self, value: str) -> pd.DataFrame:
        import pandas as pd

        summary = self.summary
        columns = {name: method[value] for name, method in summary["methods"].items()}
        return pd.DataFrame(columns, index=summary["tasks"])

    def _table(self, name: str) -> pd.DataFrame:
        import pyarrow.parquet as pq

        if self.is_finished and not (self.folder / f"report/{name}.parquet").is_file():
            raise UserError(f"{self.uri} has no {name}, since its results are those of {self.metric}")
        file = self._file(f"report/{name}.parquet", "report")
        self._file(PROVENANCE, "report")
        check_unchanged(self.folder, f"report/{name}.parquet")
        return pq.read_table(file).to_pandas()

    def _read(self, name: str, stage: str) -> dict[str, Any]:
        return read_record(self._file(name, stage))

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
    if not (folder / CONFIG).is_file():
        raise UserError(f"{source} is not a run directory (config.yaml is missing): give <storage>/{RUNS}/<run>")
    return Run(storage, folder)


def open_runs(location: str | os.PathLike[str]) -> list[Run]:
    """Return the runs of a storage, a folder or bucket, the newest first; a folder that cannot be read is logged.

    Raises:
        UserError: there is no such storage.
    """
    from pipeline.workflows.run_list import list_runs

    runs, _ = list_runs(os.fspath(location), (), None)
    for run in runs:
        if run.problem:
            log.warning("%s: %s", run.run, run.problem)
    return [open_run(run.run) for run in runs if not run.problem]
