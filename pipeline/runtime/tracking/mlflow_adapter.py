"""MLflow client calls, and the meaning of their errors."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.runtime.tracking.database import (
    artifact_location,
    check_database,
    find_experiment,
    is_sqlite,
    prepare_database,
    sqlite_file,
    sqlite_uri,
)
from pipeline.runtime.tracking.journal import Operation

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Param, RunTag

RUN_KEY = "pipeline.run_key"
METHODS_VIEW = "methods"
EXPERIMENT_TAGS = {
    # A shared view of MLflow's page: the table of all methods, with their accuracies as columns.
    f"mlflow.sharedViewState.{METHODS_VIEW}": json.dumps(
        {
            "searchFilter": "tags.level = 'method'",
            "orderByKey": "metrics.`accuracy/average`",
            "orderByAsc": False,
            "selectedColumns": [
                *("attributes.`Created`", "metrics.`accuracy/average`", "metrics.`trained_parameters`"),
                *("params.`data`", "params.`shots`", "params.`seed`"),
            ],
        }
    ),
    "mlflow.note.content": """One line for each method of each pipeline run, to compare methods, shots, seeds: search

    tags.level = 'method'

Pipeline runs, with their stages and trainings nested in them: `tags.level = 'pipeline'`. Which columns and charts to
choose for which question: docs/mlflow.md of mmap-clip.
""",
}
BATCH_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits for one request
REFUSALS = (400, 404, 413, 422)  # HTTP status codes for which a retry cannot help
CLIENT_DEFAULTS = {
    # The outbox retries by itself; MLflow's own retries (for minutes) would only hide an outage.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Else it prints two lines for each run that ends, amid the job's own.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Refused(Exception):
    """Request rejected by a server that is reachable."""


class MlflowServer:
    """Experiment of an MLflow server or database, created if missing; `files` is the folder of artifact files."""

    def __init__(self, uri: str, experiment: str, files: Path):
        self._uri, self._files = uri, files
        self.address, self.experiment = without_password(uri), experiment
        self.experiment_id = ""
        """Empty until the server was reached."""

    def connect(self) -> None:
        self._client = mlflow_client(self._uri)
        self.experiment_id = _experiment_id(self._client, self.experiment, self._uri)

    def holds(self, run_key: str, run_id: str) -> bool:
        """Return whether a SQLite database has this run, without importing MLflow, which takes seconds; False if only
        MLflow can tell."""
        if is_sqlite(self._uri):
            self.experiment_id = find_experiment(self._uri, self.experiment, run_id, RUN_KEY, run_key)
        return bool(self.experiment_id)

    def answers(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
            return True
        except Exception:
            return False

    def find_run(self, run_key: str) -> str | None:
        """Return the id of the run with this key."""
        runs = self._client.search_runs([self.experiment_id], f"tags.`{RUN_KEY}` = '{run_key}'")
        return runs[0].info.run_id if runs else None

    def start_run(self, run_key: str, name: str, parent_id: str | None, time: int) -> str:
        """Return the id of the run with this key, created if missing. Raises: Refused."""
        tags = {RUN_KEY: run_key} | ({"mlflow.parentRunId": parent_id} if parent_id else {})
        with _refusals():
            run_id = self.find_run(run_key)
            return run_id or self._client.create_run(self.experiment_id, time, tags, run_name=name).info.run_id

    def send(self, run_id: str, operations: Sequence[Operation]) -> None:
        """Send operations of one kind: at most BATCH_LIMITS, else one. Raises: Refused: One of them was rejected."""
        client, op = self._client, operations[0]
        with _refusals():
            if op.kind in BATCH_LIMITS:
                entities: list[Any] = list(map(_entity, operations))  # all of one kind
                client.log_batch(run_id, **{str(op.kind): entities}, synchronous=True)
            elif op.kind == "artifact":
                if not (file := self._files / op.value).is_file():
                    raise Refused(f"{file} was removed")
                client.log_artifact(run_id, str(file), posixpath.dirname(op.key) or None)
            elif op.kind == "dataset":
                client.log_inputs(run_id, datasets=[_dataset(op)])
            elif op.kind == "model":
                register_version(client, run_id, op.key, op.value)
            elif op.value == "RUNNING":
                client.update_run(run_id, status=op.value)
            else:
                client.set_terminated(run_id, op.value, end_time=op.time)


def methods_table_path(experiment_id: str) -> str:
    """Return the path of the table of all methods on MLflow's page, which otherwise opens an empty page for generative
    AI."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={METHODS_VIEW}&workflowType=machine_learning"


def resolve_tracking_uri(configured: str | None, storage: Path) -> str:
    """Return the configured URI, else MLFLOW_TRACKING_URI, else a SQLite file in `storage`."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path(storage).resolve() / "mlflow.db")


def check_reachable(uri: str, timeout_s: float = 10) -> None:
    """Check that `uri` can be used, before any compute. Raises: UserError: It cannot."""
    remedy = "give --tracking.uri URI; without it and without MLFLOW_TRACKING_URI, results go to a file in the storage"
    if is_sqlite(uri):
        check_database(uri)
        return
    if not re.match(r"https?://[^/]", uri):
        raise UserError(
            f"the tracking URI {without_password(uri)!r} is neither sqlite:////folder/mlflow.db nor "
            f"http(s)://host:port (MLflow 3 no longer supports file stores): {remedy}"
        )
    client = mlflow_client(uri)
    errors: list[Exception] = [TimeoutError(f"no answer within {timeout_s:g} s")]

    def list_experiments() -> None:
        try:
            client.search_experiments(max_results=1)
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    # In a thread: MLflow's timeout is per attempt, and the user may have set another one.
    thread = threading.Thread(target=list_experiments, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise UserError(
            f"MLflow at {without_password(uri)} cannot be used: listing its experiments failed with "
            f"{shortened(errors[0])}. Start the server (mlflow server --port ...), or {remedy}"
        )


def find_run(uri: str, run_key: str) -> tuple[MlflowClient, str]:
    """Return a client, and the id of the finished run with this key.

    Raises: UserError: There is none, or MLflow cannot be used.
    """
    remedy = (
        "give the server that the run was sent to with --tracking.uri, finish the run, or send what waits with "
        "mmap-clip resend"
    )
    if is_sqlite(uri) and not sqlite_file(uri).exists():
        raise UserError(f"the tracking database {sqlite_file(uri)} does not exist: {remedy}")
    check_reachable(uri)
    client = mlflow_client(uri)
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        f"tags.`{RUN_KEY}` = '{run_key}' AND attributes.status = 'FINISHED'",
        max_results=1,
    )
    if not runs:
        raise UserError(f"MLflow at {without_password(uri)} has no finished run of this folder: {remedy}")
    return client, runs[0].info.run_id


def register_version(client: MlflowClient, run_id: str, registered_model: str, artifact_path: str) -> str:
    """Return the version of a registered model for the run's model under `artifact_path`, created if missing."""
    from mlflow.exceptions import MlflowException

    source = f"runs:/{run_id}/{artifact_path}"
    try:
        client.create_registered_model(registered_model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{registered_model}' AND run_id = '{run_id}'")
    existing = [version.version for version in versions if version.source == source]
    return str(existing[0] if existing else client.create_model_version(registered_model, source, run_id).version)


def mlflow_client(uri: str) -> MlflowClient:
    """Return a client that does not wait for an unreachable server, and logs only warnings; a SQLite database is
    created.

    Raises: UserError: The SQLite database cannot be used.
    """
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow

    # The outbox logs one line per outage; schema migrations and failed attempts, with tracebacks, are noise.
    quiet = {
        "mlflow": logging.WARNING,
        "mlflow.store.db.utils": logging.CRITICAL,
        "alembic": logging.WARNING,
        "urllib3.connectionpool": logging.ERROR,
    }
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    if is_sqlite(uri):
        prepare_database(uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server knows its artifact location; a database file does not.
        location = artifact_location(uri) if is_sqlite(uri) else None
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except Exception:
            if (experiment := client.get_experiment_by_name(name)) is None:  # else another pipeline created it first
                raise
    for key, value in EXPERIMENT_TAGS.items():
        if key not in experiment.tags:  # an experiment of an older version, or of other tools
            with suppress(Exception):  # a server may allow only its administrators to change experiments
                client.set_experiment_tag(experiment.experiment_id, key, value)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise Refused for errors of the server for which a retry cannot help."""
    try:
        yield
    except Exception as error:
        if _is_refusal(error):
            raise Refused(str(error)) from error
        raise


def _is_refusal(error: Exception) -> bool:
    """Return whether MLflow rejected the content of a request; else it, a proxy or a store could not handle it now."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # of an upload
        return status in REFUSALS and status != 404  # of a proxy whose server is down
    # BAD_REQUEST is what MLflow makes of most errors of its database, such as one that became read-only, and of answers
    # of proxies; a 404 without MLflow's error code comes from a proxy whose server is down.
    if getattr(error, "error_code", "ENDPOINT_NOT_FOUND") in ("ENDPOINT_NOT_FOUND", "BAD_REQUEST"):
        return False
    # Only MLflow's own exceptions, whose methods are untyped, have an error_code.
    return cast(Any, error).get_http_status_code() in REFUSALS


def _entity(op: Operation) -> Metric | Param | RunTag:
    from mlflow.entities import Metric, Param, RunTag

    if op.kind == "metrics":
        return Metric(op.key, op.value, op.time, op.step)
    return (Param if op.kind == "params" else RunTag)(op.key, op.value)


def _dataset(op: Operation) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput

    kind = urlsplit(op.value["source"]).scheme or "local"
    source, profile = json.dumps({"uri": op.value["source"]}), json.dumps(op.value["profile"])
    digest = op.value["digest"][:36]  # MLflow's limit
    return DatasetInput(Dataset(op.key, digest, kind, source, profile=profile))


def without_password(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//", text)


def shortened(error: Exception) -> str:
    """Return the error as one line of at most 200 characters."""
    text = " ".join(without_password(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 200 else text[:200] + " ..."
