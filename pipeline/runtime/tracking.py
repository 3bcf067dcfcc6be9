"""Results of a pipeline in MLflow, through an outbox on disk.

What this module chose:
- The driver alone talks to MLflow. Its calls append to a journal on disk and return at once; one thread
  sends the journal, in order. A tracking server that is away costs the training nothing and no value.
- The journal is the memory: what it holds is not recorded a second time, so a pipeline that was killed and
  replays its calls goes on in the same MLflow runs, with each value in them once.
- Sending twice is harmless. Metrics carry their journal time (MLflow drops exact copies), and every run
  carries the tag `pipeline.run_key`, looked for before a run is made.
- What MLflow refuses for good goes to `refused.jsonl` and does not hold up the rest.
- Only `MlflowClient`: no active run, no global tracking URI. MLflow takes seconds to import, so it is
  imported where it is used.

    with Tracker(uri, "office_home", folder) as tracker:
        tracker.start_run("pipeline", tags={"config": "demo"}, params={"seed": 0})
        tracker.start_run("group: ink+chalk", parent="pipeline")
        tracker.log_metrics("group: ink+chalk", {"accuracy/ink": 0.7}, step=10)
        tracker.end_run("group: ink+chalk")
        tracker.end_run("pipeline")
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import posixpath
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit

from pipeline.errors import UserError
from pipeline.runtime.storage import FREE_SPACE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Param, RunTag

log = logging.getLogger(__name__)

JOURNAL = "outbox.jsonl"
RUN_KEY = "pipeline.run_key"
EXPERIMENT_TAGS = {
    "mlflow.note.content": """One line for each method of each pipeline run, to compare methods, shots, seeds: search

    tags.level = 'method'

Pipeline runs, with their stages and trainings nested in them: `tags.level = 'pipeline'`. Which columns and charts to
choose for which question: docs/mlflow.md of mmap-clip.
""",
}
BATCH_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits for one request
LENGTH_LIMITS = {"params": 6000, "tags": 8000}  # and for one value, in characters
REFUSALS = (400, 404, 413, 422)  # sending the same again cannot help
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
GIVE_UP_AFTER = 10  # failures of one operation while the server answers other requests
CLIENT_DEFAULTS = {
    # The outbox tries again by itself, so MLflow's own retries (minutes of them) would only hide an outage.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class DeliveryReport:
    """How many operations of the journal MLflow has, and a sentence about the rest."""

    delivered: int
    waiting: int
    refused: int
    message: str


def resolve_tracking_uri(configured: str | None, storage: Path) -> str:
    """The config's URI, else MLFLOW_TRACKING_URI, else a SQLite file in `storage`."""
    default = f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or default


def check_reachable(uri: str, timeout_s: float = 10) -> None:
    """Raise UserError unless `uri` can be used: the check at the door, before any compute."""
    remedy = "change tracking.uri in the config, or set or unset MLFLOW_TRACKING_URI"
    if uri.startswith("sqlite:"):
        try:
            folder = _sqlite_folder(uri)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return
        except (OSError, ValueError) as error:
            raise UserError(f"Tracking database {uri}: {error}. To go on, {remedy}.") from error
    if not re.match(r"https?://[^/]", uri):
        raise UserError(
            f"Tracking URI {_without_password(uri)!r} is neither sqlite:////folder/mlflow.db nor "
            f"http(s)://host:port (a folder of files is no longer a store in MLflow 3). To go on, {remedy}."
        )
    client = _client(uri)
    errors: list[Exception] = [TimeoutError(f"no answer within {timeout_s:g} s")]

    def ask() -> None:
        try:
            client.search_experiments(max_results=1)
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    # In a thread of its own: MLflow's time-out is per attempt, and the user may have set another one.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise UserError(
            f"MLflow at {_without_password(uri)} cannot be used: a list of its experiments was asked for, "
            f"and got: {_short(errors[0])}. Start the server (mlflow server --port ...), or {remedy}."
        )


def end_status(error: BaseException | None) -> str:
    """MLflow's status of a run that ended with this error, or without one."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | InterruptedError) else "FAILED"


class Tracker:
    """Records runs in `folder`, which belongs to one pipeline run (and one driver at a time), and sends them.

    Runs are addressed by local names. No method waits for the server or raises because of it; a full disk
    is a UserError.
    """

    def __init__(self, uri: str, experiment: str, folder: Path):
        self._uri, self._experiment, self._folder = uri, experiment, Path(folder)
        self._shown_uri = _without_password(uri)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._changed = threading.Condition(threading.RLock())
        self._ops: list[dict[str, Any]] = []  # the journal, a line each
        self._seen: set[tuple[Any, ...]] = set()  # identities of the journal's values
        self._status: dict[str, str] = {}  # by local run name, as last recorded
        self._parent: dict[str, str | None] = {}
        self._journal = self._open_journal()
        # One state for each destination: after a change of URI everything is sent to the new one.
        self._destination = f"{self._shown_uri} {experiment}"
        self._state = self._read_states().get(self._destination) or _new_state()
        if self._state["position"] > len(self._ops):
            self._state = _new_state()  # someone removed the journal
        self._connected = self._hurry = self._stopping = False
        self._error: Exception | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._deliver, name="mlflow-outbox", daemon=True)
        self._thread.start()

    # What the pipeline calls

    def start_run(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, Any] = {}, params: Mapping[str, Any] = {}
    ) -> None:
        """Begin the run `name`, or take it up again where an earlier process left it."""
        if parent is not None and parent not in self._status:
            raise ValueError(f"start_run({name!r}): its parent {parent!r} was not started")
        self._record("start", name, {"parent": parent})
        if self._status[name] in ("FAILED", "KILLED"):
            self._record("status", name, {"status": "RUNNING"})
        self.set_tags(name, tags)
        self.log_params(name, params)

    def log_params(self, name: str, params: Mapping[str, Any]) -> None:
        """Values that do not change; MLflow refuses a second value for a key."""
        self._record("params", name, {_key(key): _text("params", value) for key, value in params.items()})

    def set_tags(self, name: str, tags: Mapping[str, Any]) -> None:
        self._record("tags", name, {_key(key): _text("tags", value) for key, value in tags.items()})

    def log_metrics(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        """Numbers at `step`; the first value for a key and step stays."""
        self._record("metrics", name, {_key(key): float(value) for key, value in metrics.items()}, int(step))

    def log_artifact(self, name: str, path: Path, artifact_path: str | None = None) -> None:
        """A file, or a folder with all that is in it, kept as it is now."""
        path = Path(path)
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self.log_artifact(name, child, posixpath.join(artifact_path or "", path.name))
            return
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        kept = self._folder / "outbox_files" / digest / path.name
        if not kept.exists():
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, f"{kept}.part")
                os.replace(f"{kept}.part", kept)
            except OSError as error:
                raise UserError(f"cannot copy {path} to {kept}: {error.strerror}; {FREE_SPACE}") from error
        self._record("artifact", name, {posixpath.join(artifact_path or "", path.name): digest})

    def log_dataset(
        self, name: str, *, dataset_name: str, digest: str, source: str, profile: Mapping[str, Any] = {}
    ) -> None:
        """The data set the run used, as the UI's "Dataset" column shows it."""
        value = {"digest": digest, "source": str(source), "profile": dict(profile)}
        self._record("dataset", name, {dataset_name: value})

    def register_model(self, name: str, registered_model: str, artifact_path: str) -> None:
        """The MLflow model that was logged under `artifact_path` as a version of a registered model."""
        self._record("model", name, {registered_model: artifact_path})

    def end_run(self, name: str, status: str = "FINISHED") -> None:
        """A run that did not finish takes along those nested in it that are still at work."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"end_run({name!r}): status {status!r} is not FINISHED, FAILED or KILLED")
        if status != "FINISHED":
            for child, parent in list(self._parent.items()):
                if parent == name and self._status[child] == "RUNNING":
                    self.end_run(child, status)
        if self._status.get(name) != status:
            self._record("status", name, {"status": status})

    def flush(self, timeout_s: float = 60) -> DeliveryReport:
        """Wait until all is sent, or nothing was for `timeout_s`, and say how far it came."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            sent = -1
            while sent < self._state["position"] or not self._connected:
                sent = self._state["position"]
                if not self._changed.wait_for(partial(self._has_sent_more_than, sent), timeout_s):
                    break
            return self._report()

    def _has_sent_more_than(self, position: int) -> bool:
        """Or all that there is."""
        return self._connected and (self._state["position"] > position or not self._num_waiting())

    def close(self, timeout_s: float = 60) -> DeliveryReport:
        """Flush, tell the user what is missing, and stop sending."""
        report = self.flush(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(2)  # a request that hangs is left to the daemon thread, which then sends no more
        self._journal.close()
        log.log(logging.WARNING if report.waiting or report.refused else logging.INFO, report.message)
        return report

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(timeout_s=10 if error_type else 60)

    # The journal

    def _open_journal(self) -> io.FileIO:
        path = self._folder / JOURNAL
        content = path.read_bytes() if path.exists() else b""
        journal = path.open("ab", buffering=0)
        journal.truncate(content.rfind(b"\n") + 1)  # a crash may have left half a line
        for line in content.splitlines(keepends=True):
            if line.endswith(b"\n"):
                self._remember(json.loads(line))
        return journal

    def _remember(self, op: dict[str, Any]) -> None:
        self._ops.append(op)
        self._seen.update(_identity(op, key) for key in op["values"])
        if op["op"] == "start":
            self._status.setdefault(op["run"], "RUNNING")
            self._parent[op["run"]] = op["values"]["parent"]
        elif op["op"] == "status":
            self._status[op["run"]] = op["values"]["status"]

    def _record(self, kind: str, run: str, values: dict[str, Any], step: int = 0) -> None:
        """Append what the journal does not hold yet, in operations of a size that MLflow takes."""
        with self._changed:
            if kind != "start" and run not in self._status:
                raise ValueError(f"the tracking run {run!r} was not started: call start_run({run!r}) first")
            op = {"op": kind, "run": run, "step": step, "time": int(time.time() * 1000), "values": values}
            # A status may come back (failed, taken up, failed again); everything else is said once.
            new = [key for key in values if kind == "status" or _identity(op, key) not in self._seen]
            size = BATCH_LIMITS.get(kind, 1)
            parts = [new[i : i + size] for i in range(0, len(new), size)]
            ops = [op | {"values": {key: values[key] for key in part}} for part in parts]
            if ops:
                self._append("".join(json.dumps(op) + "\n" for op in ops).encode())
                for op in ops:
                    self._remember(op)
                self._changed.notify_all()

    def _append(self, lines: bytes) -> None:
        """Raises: UserError: the disk is full; the journal is as before."""
        before = os.fstat(self._journal.fileno()).st_size
        try:
            if self._journal.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._journal.fileno())
        except OSError as error:
            self._journal.truncate(before)
            raise UserError(f"cannot write {self._journal.name}: {error.strerror}; {FREE_SPACE}") from error

    # The thread that sends

    def _deliver(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._stopping:
            try:
                if not self._connected:
                    self._connect()
                if self._num_waiting():
                    self._deliver_next()
                with self._changed:
                    if self._error:
                        log.warning("MLflow at %s takes operations again.", self._shown_uri)
                    self._error, self._failures, pause = None, 0, FIRST_PAUSE_S
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._num_waiting() or self._stopping)
            except Exception as error:
                with self._changed:
                    told, self._error = self._error, error
                    if not told:
                        log.warning("%s Training goes on.", self._report().message)
                    self._changed.wait_for(lambda: self._hurry or self._stopping, pause)
                    self._hurry = False
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _connect(self) -> None:
        self._client = _client(self._uri)
        self._experiment_id = _experiment_id(self._client, self._experiment, self._uri)
        if self._state["runs"] and not self._find_run(next(iter(self._state["runs"]))):
            self._state = _new_state()  # the store was emptied since: the journal still has everything
        self._connected = True

    def _deliver_next(self) -> None:
        """Send the operation at the journal's position, with the metrics that follow metrics."""
        start = stop = self._state["position"]
        num_values = 0
        while stop == start or (
            stop < len(self._ops)
            and self._failures == 0  # after a failure one by one, to find the one that fails
            and self._ops[stop]["op"] == self._ops[start]["op"] == "metrics"
            and num_values + len(self._ops[stop]["values"]) <= BATCH_LIMITS["metrics"]
        ):
            num_values += len(self._ops[stop]["values"])
            stop += 1
        try:
            self._send(range(start, stop))
        except Exception as error:
            if not _is_refusal(error):
                self._failures = self._failures + 1 if self._server_answers() else 0
                if self._failures < GIVE_UP_AFTER:
                    raise
            self._refuse(start, self._ops[start]["values"], error)
        if not self._stopping:
            with self._changed:
                self._state["position"] = stop
                self._write_state()

    def _send(self, positions: range) -> None:
        op = self._ops[positions[0]]
        kind, run, values = op["op"], op["run"], op["values"]
        if kind == "start":
            self._state["runs"][run] = self._find_run(run) or self._create_run(op)
        elif kind in BATCH_LIMITS:
            keys: dict[str, list[tuple[int, str]]] = {}
            for position in positions:
                op = self._ops[position]
                keys.setdefault(op["run"], []).extend((position, key) for key in op["values"])
            for run in keys:
                self._send_batch(self._state["runs"][run], kind, keys[run])
        else:
            run_id = self._state["runs"][run]
            for key, value in values.items():
                if kind == "artifact":
                    kept = self._folder / "outbox_files" / value / posixpath.basename(key)
                    self._client.log_artifact(run_id, str(kept), posixpath.dirname(key) or None)
                elif kind == "dataset":
                    self._send_dataset(run_id, _dataset(key, value))
                elif kind == "model":
                    register_version(self._client, run_id, key, value)
                elif value == "RUNNING":
                    self._client.update_run(run_id, status=value)
                else:
                    self._client.set_terminated(run_id, value, end_time=op["time"])

    def _send_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        try:
            self._client.log_inputs(run_id, datasets=[dataset])
        except Exception as error:
            if not _is_refusal(error):
                raise
            # MLflow refuses a data set that another run of the experiment stores at the same moment; then it is there.
            self._client.log_inputs(run_id, datasets=[dataset])

    def _send_batch(self, run_id: str, kind: str, keys: list[tuple[int, str]]) -> None:
        """Send values, named by position and key, in one request; what is refused is halved."""
        entities: list[Any] = [_entity(self._ops[position], key) for position, key in keys]  # all of `kind`
        try:
            self._client.log_batch(run_id, **{kind: entities}, synchronous=True)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if len(keys) == 1:
                [(position, key)] = keys
                self._refuse(position, {key: self._ops[position]["values"][key]}, error)
            else:
                self._send_batch(run_id, kind, keys[: len(keys) // 2])
                self._send_batch(run_id, kind, keys[len(keys) // 2 :])

    def _run_key(self, run: str) -> str:
        # The journal's first moment tells it from another one of the same config, in another storage.
        return f"{self._folder.name}-{self._ops[0]['time']:x}/{quote(run, safe=' :+,')}"

    def _find_run(self, run: str) -> str | None:
        key_matches = f"tags.`{RUN_KEY}` = '{self._run_key(run)}'"
        found = self._client.search_runs([self._experiment_id], key_matches)
        return found[0].info.run_id if found else None

    def _create_run(self, op: dict[str, Any]) -> str:
        tags = {RUN_KEY: self._run_key(op["run"])}
        if op["values"]["parent"]:
            tags["mlflow.parentRunId"] = self._state["runs"][op["values"]["parent"]]
        run = self._client.create_run(self._experiment_id, op["time"], tags, run_name=op["run"])
        run_id: str = run.info.run_id
        return run_id

    def _server_answers(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
            return True
        except Exception:
            return False

    # What is on disk beside the journal

    def _refuse(self, position: int, values: dict[str, Any], error: Exception) -> None:
        reason = {"error": _without_password(str(error)), "destination": self._destination}
        record = self._ops[position] | {"values": values} | reason
        with (self._folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if not self._state["refused"]:
            what = f"{', '.join(values)} of run {record['run']!r}"
            log.warning("MLflow refused %s: %s. More go to %s without a word.", what, _short(error), file.name)
        if position not in self._state["refused"]:
            self._state["refused"].append(position)

    def _read_states(self) -> dict[str, Any]:
        try:
            states: dict[str, Any] = json.loads((self._folder / "outbox_state.json").read_text())
            return states
        except (FileNotFoundError, json.JSONDecodeError):
            return {}  # sending again is harmless

    def _write_state(self) -> None:
        temporary = self._folder / "outbox_state.part"
        with temporary.open("w") as file:
            json.dump(self._read_states() | {self._destination: self._state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / "outbox_state.json")

    def _num_waiting(self) -> int:
        position: int = self._state["position"]
        return len(self._ops) - position

    def _report(self) -> DeliveryReport:
        total, waiting, refused = len(self._ops), self._num_waiting(), len(self._state["refused"])
        message = f"MLflow at {self._shown_uri} has all {total} tracking operations."
        if waiting:
            why = f" ({_short(self._error)})" if self._error else ""
            again = f"Tracker({self._shown_uri!r}, {self._experiment!r}, {str(self._folder)!r}).flush()"
            message = (
                f"MLflow at {self._shown_uri} lacks {waiting} of {total} tracking operations{why}. "
                f"They are kept in {self._folder / JOURNAL}; the same command run again, or {again}, "
                f"sends them."
            )
        if refused:
            message += f" Of these it refused {refused}: see {self._folder / 'refused.jsonl'}."
        return DeliveryReport(total - waiting - refused, waiting, refused, message)


def run_environment() -> dict[str, str]:
    """What a result depends on beside the config: versions, machine, commit."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["cpus"] = str(os.cpu_count())
    for package in ("torch", "ray", "mlflow", "open_clip_torch", "numpy", "pyarrow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    try:
        import torch

        found["gpus"] = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none"
    except ImportError:
        pass
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found["git_commit"] = subprocess.check_output(
            describe, text=True, stderr=subprocess.DEVNULL, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return found


# MLflow's side


def find_run(uri: str, run_folder: str) -> tuple[MlflowClient, str]:
    """MlflowClient, and the id of the newest finished run whose results are in `run_folder`, as its report says.

    Raises:
        UserError: there is none, or MLflow cannot be used.
    """
    check_reachable(uri)
    client = _client(uri)
    quote_mark = '"' if "'" in run_folder else "'"
    found = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        f"tags.run_folder = {quote_mark}{run_folder}{quote_mark} AND attributes.status = 'FINISHED'",
        max_results=1,
    )
    if not found:
        raise UserError(
            f"MLflow at {_without_password(uri)} has no finished run of {run_folder}: give the folder as the run's "
            "report shows it, the server that the run was sent to, or run it to its end"
        )
    return client, found[0].info.run_id


def register_version(client: MlflowClient, run_id: str, registered_model: str, artifact_path: str) -> str:
    """The version of a registered model that is the run's model under `artifact_path`; made unless it is there."""
    from mlflow.exceptions import MlflowException

    source = f"runs:/{run_id}/{artifact_path}"
    try:
        client.create_registered_model(registered_model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{registered_model}' AND run_id = '{run_id}'")
    there = [version.version for version in versions if version.source == source]
    return str(there[0] if there else client.create_model_version(registered_model, source, run_id).version)


def _client(uri: str) -> MlflowClient:
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow

    # One line an outage is the outbox's to say; the schema's migrations and each failed attempt are noise.
    quiet = {"mlflow": logging.WARNING, "alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR}
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server knows where its artefacts belong; a database file does not.
        location = (_sqlite_folder(uri) / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another pipeline was first
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def _is_refusal(error: Exception) -> bool:
    """Whether the server took the request and said no, rather than being away."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in REFUSALS
    # A 404 without a message of MLflow's comes from a proxy whose server is away.
    code = getattr(error, "error_code", "ENDPOINT_NOT_FOUND")
    # Only MLflow's own exceptions, whose methods have no types, have an error_code.
    return code != "ENDPOINT_NOT_FOUND" and cast(Any, error).get_http_status_code() in REFUSALS


def _entity(op: dict[str, Any], key: str) -> Metric | Param | RunTag:
    from mlflow.entities import Metric, Param, RunTag

    if op["op"] == "metrics":
        return Metric(key, op["values"][key], op["time"], op["step"])
    return (Param if op["op"] == "params" else RunTag)(key, op["values"][key])


def _dataset(name: str, value: dict[str, Any]) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput

    kind = urlsplit(value["source"]).scheme or "local"
    source, profile = json.dumps({"uri": value["source"]}), json.dumps(value["profile"])
    digest = value["digest"][:36]  # MLflow's limit
    return DatasetInput(Dataset(name, digest, kind, source, profile=profile))


# Small things


def _new_state() -> dict[str, Any]:
    return {"position": 0, "runs": {}, "refused": []}


def _identity(op: dict[str, Any], key: str) -> tuple[Any, ...]:
    """What makes a value the same: a metric by its step, anything else by the value itself."""
    return op["op"], op["run"], key, op["step"] if op["op"] == "metrics" else json.dumps(op["values"][key])


def _key(key: str) -> str:
    """A name that MLflow takes: "ink+chalk" becomes "ink_chalk"."""
    return re.sub(r"[^\w\-. :/]", "_", str(key))


def _text(kind: str, value: object) -> str:
    text, limit, mark = str(value), LENGTH_LIMITS[kind], " ... (cut)"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def _short(error: Exception) -> str:
    text = " ".join(_without_password(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 200 else text[:200] + " ..."


def _sqlite_folder(uri: str) -> Path:
    path = uri.removeprefix("sqlite:///").split("?")[0]
    if path == uri or not path:
        raise ValueError("a database file looks like sqlite:////folder/mlflow.db")
    return Path(path).resolve().parent


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)
