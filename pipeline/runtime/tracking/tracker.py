"""Tracker: the interface by which the pipeline records its runs."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import TrackingConfig
from pipeline.files import read_json, write_json
from pipeline.runtime.tracking.database import is_sqlite, sqlite_file, sqlite_uri
from pipeline.runtime.tracking.delivery import Delivery, DeliveryReport
from pipeline.runtime.tracking.journal import Journal
from pipeline.runtime.tracking.mlflow_adapter import MlflowServer, resolve_tracking_uri, without_password

log = logging.getLogger(__name__)

TARGET = "target.json"
"""File beside a journal: tracking URI and experiment, by which a later job finds its runs."""

LENGTH_LIMITS = {"params": 6000, "tags": 8000}  # MLflow's, in characters


def end_status(error: BaseException | None) -> str:
    """Return the MLflow status of a run that ended with this error, or without one."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | InterruptedError) else "FAILED"


def open_tracker(tracking: TrackingConfig, storage: Path, folder: Path, retry_refused: bool = False) -> Tracker:
    """Open the tracker of the journal in `folder`, and write where it sends its runs.

    Raises:
        UserError: The journal cannot be read or written.
    """
    uri = resolve_tracking_uri(tracking.uri, storage)
    tracker = Tracker(uri, tracking.experiment, folder, retry_refused)
    target: dict[str, str | None] = {"uri": tracking.uri and without_password(tracking.uri)}
    if is_sqlite(uri):  # a storage may be moved
        file = sqlite_file(uri)
        target["uri"] = sqlite_uri(file)
        if file.is_relative_to(storage.resolve()):
            target = {"database": file.relative_to(storage.resolve()).as_posix()}
    write_json(folder / TARGET, target | {"experiment": tracking.experiment})
    return tracker


def read_target(storage: Path, folder: Path) -> TrackingConfig:
    """Return where the runs of the journal in `folder` were sent; the defaults if that is unknown."""
    try:
        target = read_json(folder / TARGET)
        uri = sqlite_uri(storage.resolve() / target["database"]) if "database" in target else target["uri"]
        return TrackingConfig(uri=uri, experiment=target["experiment"])
    except FileNotFoundError:
        return TrackingConfig()
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s is damaged (%s): give --tracking.uri and --tracking.experiment", folder / TARGET, error)
        return TrackingConfig()


class Tracker:
    """Records runs in `folder`, which belongs to one pipeline run and one driver at a time, and sends them.

    Runs have local names. No method waits for the server or raises its errors; a full disk is a UserError.
    """

    def __init__(self, uri: str, experiment: str, folder: Path, retry_refused: bool = False):
        """
        Args:
            retry_refused: whether operations that MLflow refused earlier are sent again.
        """
        self._journal = Journal(Path(folder))
        self._server = MlflowServer(uri, experiment, self._journal.folder)
        self._delivery = Delivery(self._journal, self._server, retry_refused)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment; empty until the server was reached."""
        return self._server.experiment_id

    def start_run(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, Any] = {}, params: Mapping[str, Any] = {}
    ) -> None:
        """Start the run `name`, or resume it where an earlier process left it, with its params: MLflow refuses other
        values, such as the path of data that was moved since."""
        if parent is not None and parent not in self._journal.status:
            raise ValueError(f"start_run({name!r}): the parent {parent!r} was not started")
        self._journal.record("start", name, {"parent": parent})
        if self._journal.status[name] in ("FAILED", "KILLED"):
            self._journal.record("status", name, {"status": "RUNNING"})
        self.set_tags(name, tags)
        recorded = self._journal.params.get(name, set())
        self.log_params(name, {key: value for key, value in params.items() if _key(key) not in recorded})

    def log_params(self, name: str, params: Mapping[str, Any]) -> None:
        """Log values that do not change; MLflow refuses a second value for a key."""
        self._journal.record("params", name, {_key(key): _text("params", value) for key, value in params.items()})

    def set_tags(self, name: str, tags: Mapping[str, Any]) -> None:
        self._journal.record("tags", name, {_key(key): _text("tags", value) for key, value in tags.items()})

    def log_metrics(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at `step`; the first value for a key and step is kept."""
        self.log_metric_history(name, [(step, metrics)])

    def log_metric_history(self, name: str, history: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log numbers of several steps at once, as `log_metrics` does."""
        steps = ((int(step), {_key(key): float(value) for key, value in metrics.items()}) for step, metrics in history)
        self._journal.record_steps("metrics", name, steps)

    def log_artifact(self, name: str, path: Path, artifact_path: str | None = None) -> None:
        """Log a file, or a folder with its content, in its current state."""
        path = Path(path)
        target = posixpath.join(artifact_path or "", path.name)
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self.log_artifact(name, child, target)
        else:
            self._journal.record("artifact", name, {target: self._journal.keep(path)})

    def log_dataset(
        self, name: str, *, dataset_name: str, digest: str, source: str, profile: Mapping[str, Any] = {}
    ) -> None:
        """Log the data set of the run, for the UI's "Dataset" column."""
        value = {"digest": digest, "source": str(source), "profile": dict(profile)}
        self._journal.record("dataset", name, {dataset_name: value})

    def register_model(self, name: str, registered_model: str, artifact_path: str) -> None:
        """Register the model logged under `artifact_path` as a version of a registered model."""
        self._journal.record("model", name, {registered_model: artifact_path})

    def end_run(self, name: str, status: str = "FINISHED") -> None:
        """End a run; with another status than FINISHED, also those of its nested runs that are still running."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"end_run({name!r}): status {status!r} is not FINISHED, FAILED or KILLED")
        journal = self._journal
        if status != "FINISHED":
            for child, parent in list(journal.parent.items()):
                if parent == name and journal.status[child] == "RUNNING":
                    self.end_run(child, status)
        if journal.status.get(name) != status:
            self._journal.record("status", name, {"status": status})

    def end_all(self, status: str) -> None:
        """End all runs that are still running, also those that an earlier, killed process left."""
        for name, current in list(self._journal.status.items()):
            if current == "RUNNING":
                self._journal.record("status", name, {"status": status})

    def flush(self, timeout_s: float = 60) -> DeliveryReport:
        """Wait until all is sent, or nothing was sent for `timeout_s`; return a report."""
        return self._delivery.flush(timeout_s)

    def close(self, timeout_s: float = 60) -> DeliveryReport:
        """Flush, log what was not sent, and stop sending."""
        report = self.flush(timeout_s)
        self._delivery.stop()
        self._journal.close()
        log.log(logging.WARNING if report.waiting or report.refused else logging.INFO, report.message)
        return report

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(timeout_s=10 if error_type else 60)


def _key(key: str) -> str:
    """Return a valid MLflow key: "ink+chalk" becomes "ink_chalk"."""
    return re.sub(r"[^\w\-. :/]", "_", str(key))


def _text(kind: str, value: object) -> str:
    text, limit, mark = str(value), LENGTH_LIMITS[kind], " ... (cut)"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark
