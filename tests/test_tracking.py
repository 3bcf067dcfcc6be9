"""Tracking by its parts: the journal, the delivery to a server that the tests make up, and a real MLflow: a SQLite
store, and a server that goes away and comes back."""

import json
import logging
import shutil
import socket
import sqlite3
import threading
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import requests
import sqlalchemy.orm
from filelock import FileLock
from rich.console import Console
from servers import free_ports, mlflow_server

from jobs import resend
from pipeline.config import CONFIGS, TrackingConfig, load_yaml, parse_config
from pipeline.errors import UserError
from pipeline.runtime.cluster import WorkerResources
from pipeline.runtime.environment import run_environment
from pipeline.runtime.session import Session
from pipeline.runtime.stage import Stage
from pipeline.runtime.storage import Storage
from pipeline.runtime.tracking import delivery
from pipeline.runtime.tracking.delivery import PROGRESS, REFUSED, Delivery
from pipeline.runtime.tracking.journal import DAMAGED, JOURNAL, Journal, Operation
from pipeline.runtime.tracking.mlflow_adapter import (
    MlflowServer,
    Refused,
    _refusals,
    check_reachable,
    mlflow_client,
    resolve_tracking_uri,
)
from pipeline.runtime.tracking.tracker import TARGET, Tracker, open_tracker, read_target
from pipeline.stages.plan import Plan, make_plan
from pipeline.stages.run import run_session

mlflow = pytest.importorskip("mlflow")
from mlflow.exceptions import RestException  # noqa: E402
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND  # noqa: E402

GROUP = "group: ink+chalk"
DATASET = {"dataset_name": "office_demo", "digest": "d" * 64, "source": "/data/office_demo"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pipeline-1a2b3c"


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "affinity.svg"
    path.write_text("<svg/>")
    return path


# --- the journal --------------------------------------------------------------------------------------------


def record_all(journal):
    journal.record("start", "pipeline", {"parent": None})
    journal.record("params", "pipeline", {"seed": "0", "rank": "4"})
    journal.record("metrics", "pipeline", {"loss": 0.5, "accuracy": float("nan")}, step=1)
    journal.record("metrics", "pipeline", {"loss": 0.25}, step=2)
    journal.record("dataset", "pipeline", {"demo": {"digest": "d", "profile": {}}})
    journal.record("status", "pipeline", {"status": "FINISHED"})


def test_a_value_is_recorded_once(folder):
    """Also by the next process, after any number of lines, and half of one more, reached the disk."""
    journal = Journal(folder)
    record_all(journal)
    journal.record("metrics", "pipeline", {"loss": 0.75}, step=1)  # the first one stays
    journal.close()
    lines, operations = (folder / JOURNAL).read_text().splitlines(keepends=True), journal.operations
    values = [(op.kind, op.key, op.step, str(op.value)) for op in operations]
    assert len(set(values)) == len(lines) == 8 and ("metrics", "loss", 1, "0.5") in values
    for copy, line in enumerate([*lines, '{"kind": "met\n']):
        (folder / JOURNAL).write_text("".join(lines[:copy]) + line[: len(line) // 2])
        journal = Journal(folder)
        assert len(journal.operations) == copy
        if copy < 8:  # a status is said again
            record_all(journal)
        journal.close()
        assert [(op.kind, op.key, op.step, str(op.value)) for op in journal.operations] == values
        assert len((folder / JOURNAL).read_text().splitlines()) == 8


def test_a_status_comes_back_and_a_value_may_be_another(folder):
    journal = Journal(folder)
    record_all(journal)
    for status in ("FAILED", "RUNNING", "FAILED"):
        journal.record("status", "pipeline", {"status": status})
    journal.record("tags", "pipeline", {"state": "a"})
    journal.record("tags", "pipeline", {"state": "b"})
    assert [op.value for op in journal.operations[-5:]] == ["FAILED", "RUNNING", "FAILED", "a", "b"]
    assert journal.status == {"pipeline": "FAILED"}


def test_a_full_disk_is_named_and_leaves_the_journal_whole(folder, figure, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    journal = Journal(folder)
    record_all(journal)
    contents, count = (folder / JOURNAL).read_bytes(), len(journal.operations)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(
            UserError, match="cannot write .*affinity.svg: No space left on device; free some disk space"
        ):
            journal.keep(figure)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="cannot write .*No space left on device; free some disk space"):
            journal.record("tags", "pipeline", {"state": "a"})
    assert (folder / JOURNAL).read_bytes() == contents and len(journal.operations) == count
    copy = journal.keep(figure)
    journal.record("tags", "pipeline", {"state": "a"})
    figure.write_text("<svg>later</svg>")
    assert (folder / copy).read_text() == "<svg/>" and journal.keep(figure) != copy
    assert len(Journal(folder).operations) == count + 1


DAMAGES = {
    "cut": lambda line: line[: len(line) // 2],
    "empty": lambda line: b"",
    "zeros": lambda line: b"\0" * len(line),
    "not UTF-8": lambda line: b"\xff" + line[1:],
    "a list": lambda line: b"[1, 2]",
    "another object": lambda line: b'{"kind": "metrics"}',
    "another kind": lambda line: line.replace(b'"kind": "', b'"kind": "x'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, 3, 4])
def test_a_damaged_line_loses_no_other(folder, server, caplog, damage, number):
    """Also of what was sent already, so that positions change; the same MLflow runs go on."""
    journal = Journal(folder)
    record_all(journal)
    journal.record("start", "child", {"parent": "pipeline"})
    assert delivered(journal, server).waiting == 0
    journal.record("metrics", "child", {"loss": 0.125}, step=0)  # not sent yet
    journal.close()
    lines, values = (folder / JOURNAL).read_bytes().splitlines(), list(server.sent)
    damaged = DAMAGES[damage](lines[number])
    (folder / JOURNAL).write_bytes(b"".join(line + b"\n" for line in [*lines[:number], damaged, *lines[number + 1 :]]))

    journal = Journal(folder)
    assert (
        f"damaged in 1 of 10 lines ({number + 1})" in caplog.text and (folder / DAMAGED).read_bytes() == damaged + b"\n"
    )
    assert len(journal.operations) == (10 if number == 0 else 9)  # a lost start is made up
    assert {run: parent for run, parent in journal.parent.items()} == {"pipeline": None, "child": "pipeline"}
    assert delivered(journal, server).waiting == 0
    assert len(server.runs) == 2 and server.sent[-1][1:] == ("loss", 0.125)
    journal.close()
    caplog.clear()
    journal = Journal(folder)
    record_all(journal)  # as the same command does
    assert not caplog.messages and delivered(journal, server).waiting == 0
    assert {str(value) for value in values} <= {str(value) for value in server.sent}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"position": "x", "journal_id": "a"}', b"\0" * 9]
)
def test_a_damaged_record_of_the_delivery_loses_nothing(folder, server, caplog, content):
    journal = Journal(folder)
    record_all(journal)
    assert delivered(journal, server).waiting == 0
    journal.close()
    num_operations = len(server.sent)
    (folder / PROGRESS).write_bytes(content)
    assert delivered(Journal(folder), server).waiting == 0
    assert (
        f"{folder / PROGRESS} is damaged" in caplog.text
        and len(server.sent) == 2 * num_operations
        and len(server.runs) == 1
    )


def test_a_journal_that_cannot_be_opened_is_named(folder):
    (folder / JOURNAL).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{JOURNAL}: Is a directory"):
        Journal(folder)


@pytest.mark.parametrize("point", ["os.fsync", "pipeline.runtime.tracking.journal.Journal._index"])
def test_an_interrupt_while_a_value_is_recorded_leaves_file_and_memory_equal(folder, server, monkeypatch, point):
    journal = Journal(folder)
    record_all(journal)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(point, interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.record("status", "pipeline", {"status": "FAILED"})
    journal.record("tags", "pipeline", {"state": "a"})
    assert journal.status == {"pipeline": "FINISHED"}
    assert list(map(str, Journal(folder).operations)) == list(map(str, journal.operations))


# --- the delivery -------------------------------------------------------------------------------------------


class MadeUpServer:
    """Keeps what it is sent, or raises what `fault` gives for it."""

    address, experiment = "http://made-up", "demo"

    def __init__(self):
        self.runs, self.sent, self.requests, self.fault = {}, [], [], lambda operations: None
        self.is_away = False

    def connect(self):
        if self.is_away:
            raise ConnectionError("away")

    def answers(self):
        return not self.is_away

    def holds(self, run_key, run_id):
        return False  # as of a server, which only a client can ask

    def find_run(self, run_key):
        return self.runs.get(run_key)

    def start_run(self, run_key, name, parent_id, time):
        self.connect()
        if name == "bad":
            raise Refused("a bad name")
        return self.runs.setdefault(run_key, f"id of {name}, of {parent_id}")

    def send(self, run_id, operations):
        self.connect()
        assert len({op.kind for op in operations}) == 1
        if error := self.fault(operations):
            raise error
        self.requests.append(len(operations))
        self.sent += [(run_id, op.key, op.value) for op in operations]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(delivery, "MIN_RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(delivery, "MAX_RETRY_DELAY_S", 0.01)


@pytest.fixture
def server(no_pauses):
    return MadeUpServer()


def delivered(journal, server, timeout_s=60):
    """The report of a delivery of its own, as of a new process."""
    sending = Delivery(journal, server)
    report = sending.flush(timeout_s)
    sending.stop()
    return report


def record_metrics(journal, runs, steps):
    for run in runs:
        journal.record("start", run, {"parent": None})
    for step in range(steps):
        for run in runs:
            journal.record("metrics", run, {"loss": step}, step=step)


def test_values_of_several_runs_share_few_requests_of_a_size_that_mlflow_takes(folder, server):
    journal = Journal(folder)
    record_metrics(journal, ["a", "b"], 30)
    journal.record("metrics", "a", {f"m{i}": i for i in range(2500)}, step=0)
    journal.record("params", "b", {f"p{i}": str(i) for i in range(250)})
    report = delivered(journal, server)
    assert (report.delivered, report.waiting, report.refused) == (2812, 0, 0)
    assert server.requests == [970, 30, 1000, 560, 100, 100, 50]
    for run in ("a", "b"):
        values = [(op.key, op.value) for op in journal.operations if op.run == run and op.kind != "start"]
        assert [(key, value) for run_id, key, value in server.sent if run_id == f"id of {run}, of None"] == values


def test_one_rejected_value_among_many_is_reported(folder, server, caplog):
    journal = Journal(folder)
    record_metrics(journal, ["a"], 0)
    journal.record("params", "a", {f"p{i}": str(i) for i in range(90)})
    server.fault = lambda operations: Refused("no") if {"p7", "p50"} & {op.key for op in operations} else None
    report = delivered(journal, server)
    assert (report.delivered, report.waiting, report.refused) == (89, 0, 2) and REFUSED in report.message
    assert sorted(key for _, key, _ in server.sent) == sorted({f"p{i}" for i in range(90)} - {"p7", "p50"})
    refused = [json.loads(line) for line in (folder / REFUSED).read_text().splitlines()]
    assert [(line["run"], line["key"], line["error"]) for line in refused] == [("a", "p7", "no"), ("a", "p50", "no")]
    assert sum("MLflow refused" in message for message in caplog.messages) == 1
    assert delivered(Journal(folder), server).refused == 2 and len(server.sent) == 88


def test_persistent_failures_hold_up_only_their_own_work(folder, server):
    journal = Journal(folder)
    record_metrics(journal, ["a"], 300)
    server.fault = lambda operations: RuntimeError("a bug") if 123 in [op.value for op in operations] else None
    report = delivered(journal, server)
    assert (report.delivered, report.waiting, report.refused) == (300, 1, 0)
    assert [value for *_, value in server.sent] == [step for step in range(300) if step != 123]
    server.fault = lambda operations: None
    report = delivered(Journal(folder), server)
    assert (report.delivered, report.waiting) == (301, 0) and server.sent[-1][-1] == 123


def test_values_of_a_run_that_is_refused_do_not_hold_up_the_rest(folder, server, monkeypatch):
    monkeypatch.setattr(delivery, "MAX_FAILURES", 1_000_000)
    journal = Journal(folder)
    record_metrics(journal, ["bad", "good"], 2)
    journal.record("start", "child", {"parent": "bad"})
    journal.record("start", "grandchild", {"parent": "good"})
    report = delivered(journal, server, timeout_s=5)
    assert (report.waiting, report.refused) == (0, 4)
    assert [value for *_, value in server.sent] == [0, 1]
    assert list(server.runs.values()) == ["id of good, of None", "id of grandchild, of id of good, of None"]


CANNOT_WRITE = RuntimeError("503: database or disk is full")


@pytest.mark.parametrize("is_next_process", [False, True])
@pytest.mark.parametrize("failing", ["all", "start", "metrics", "status", "artifact"])
def test_a_server_that_reads_and_cannot_write_gets_all_later(
    folder, server, figure, monkeypatch, failing, is_next_process
):
    """As with a full disk: what it does not write is kept as what it cannot be sent, and statuses stay in order."""
    monkeypatch.setattr(delivery, "MAX_FAILURES", 3)
    start_run = server.start_run

    def cannot_write(operations):
        return CANNOT_WRITE if failing in ("all", operations[0].kind) else None

    def cannot_start(*arguments):
        raise CANNOT_WRITE

    if failing in ("all", "start"):
        server.start_run = cannot_start
    server.fault = cannot_write
    journal = Journal(folder)
    sending = Delivery(journal, server)
    record_metrics(journal, ["parent"], 5)
    journal.record("start", "child", {"parent": "parent"})
    journal.record("artifact", "child", {"a.svg": journal.keep(figure)})
    journal.record("status", "child", {"status": "FAILED"})
    journal.record("status", "child", {"status": "RUNNING"})
    report = sending.flush(60)
    total = len(journal.operations)
    # All but the status that a later one supersedes.
    waiting = {"all": total - 1, "start": total - 1, "metrics": 5, "status": 1, "artifact": 1}[failing]
    assert (report.waiting, report.refused) == (waiting, 0) and report.delivered == total - waiting
    assert "database or disk is full" in report.message and "mmap-clip resend" in report.message
    journal.record("status", "child", {"status": "FINISHED"})
    journal.record("status", "parent", {"status": "FINISHED"})
    server.start_run, server.fault = start_run, lambda operations: None
    if is_next_process:
        sending.stop()
        journal.close()
        report = delivered(Journal(folder), server)
    else:
        report = sending.flush(60)
        sending.stop()
    assert (report.waiting, report.refused) == (0, 0) and not (folder / REFUSED).exists()
    for run in ("parent", "child"):
        values = [value for run_id, key, value in server.sent if run_id.startswith(f"id of {run},") and key == "status"]
        assert values[-1] == "FINISHED", values
    assert sorted(value for *_, key, value in server.sent if key == "loss") == [0, 1, 2, 3, 4]
    assert [key for _, key, _ in server.sent].count("a.svg") == 1


def test_artifacts_that_a_store_does_not_take_delay_nothing_else(folder, server, figure, monkeypatch):
    """Such as one without credentials: one artifact is tried often, the others once for each flush."""
    monkeypatch.setattr(delivery, "MAX_FAILURES", 3)
    attempts = []

    def fault(operations):
        attempts.extend(op.key for op in operations if op.kind == "artifact")
        return CANNOT_WRITE if operations[0].kind == "artifact" else None

    server.fault = fault
    journal = Journal(folder)
    record_metrics(journal, ["a"], 1)
    for number in range(3):
        journal.record("artifact", "a", {f"{number}.svg": journal.keep(figure)})
        journal.record("metrics", "a", {"later": number}, step=number)
    journal.record("model", "a", {"digits": "model"})
    report = delivered(journal, server)
    assert (report.waiting, report.refused) == (4, 0) and "model" not in [key for _, key, _ in server.sent]
    assert [value for _, key, value in server.sent if key == "later"] == [0, 1, 2]
    assert [attempts.count(f"{number}.svg") for number in range(3)] == [4, 1, 1]


def test_a_refused_start_is_sent_again_with_all_of_its_run_when_asked(folder, server):
    journal = Journal(folder)
    record_metrics(journal, ["bad", "good"], 2)
    assert delivered(journal, server).refused == 3
    assert delivered(Journal(folder), server).refused == 3  # not by itself
    server.start_run = lambda run_key, *_: server.runs.setdefault(run_key, "an id")
    sending = Delivery(Journal(folder), server, retry_refused=True)
    report = sending.flush(60)
    sending.stop()
    assert (report.waiting, report.refused) == (0, 0) and not (folder / REFUSED).exists()
    assert [value for run_id, _, value in server.sent if run_id == "an id"] == [0, 1]


def test_another_server_gets_what_one_refused_as_a_whole(folder, server):
    journal = Journal(folder)
    record_metrics(journal, ["bad"], 2)
    assert delivered(journal, server).refused == 3
    server.start_run = lambda run_key, *_: server.runs.setdefault(run_key, "an id")
    report = delivered(journal, server)
    assert (report.delivered, report.refused, len(server.sent)) == (3, 0, 2)


def test_a_server_that_is_away_gets_each_value_once_when_it_is_back(folder, server, caplog):
    journal = Journal(folder)
    record_metrics(journal, ["a"], 2)
    sending = Delivery(journal, server)
    assert sending.flush(60).waiting == 0
    server.is_away = True
    record_metrics(journal, ["a", "b"], 5)
    report = sending.flush(0.3)
    assert report.waiting == 9 and server.address in report.message and str(folder) in report.message
    server.is_away = False
    assert sending.flush(60).waiting == 0
    sending.stop()
    for run_id in server.runs.values():
        assert [value for target, _, value in server.sent if target == run_id] == [0, 1, 2, 3, 4]
    assert len(server.runs) == 2 and len(server.sent) == 10
    away, back = [message for message in caplog.messages if server.address in message]
    assert "(ConnectionError: away). They are kept in " in away and "rerun the same command to send them" in away
    assert back == f"MLflow at {server.address} is reachable again."


# --- MLflow -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow's schema takes seconds to make: once, then copied."""
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def new_uri(empty_database, tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        shutil.copy(empty_database, tmp_path / name / "mlflow.db")
        return f"sqlite:///{tmp_path / name / 'mlflow.db'}"

    return make


@pytest.fixture
def uri(empty_database):
    """A store that the tests share, without the experiment "demo"."""
    uri = f"sqlite:///{empty_database.with_name('shared.db')}"
    if not empty_database.with_name("shared.db").exists():
        shutil.copy(empty_database, empty_database.with_name("shared.db"))
    yield uri
    client = mlflow_client(uri)
    if used := client.get_experiment_by_name("demo"):
        client.rename_experiment(used.experiment_id, uuid.uuid4().hex)


def log_pipeline(tracker, figure, steps=range(3)):
    """The calls of one small pipeline, all of which a restarted one repeats."""
    tracker.start_run("pipeline", tags={"config": "demo"}, params={"seed": 0, "classes": "x" * 7000})
    tracker.log_dataset("pipeline", **DATASET, profile={"images": 40})
    tracker.start_run(GROUP, parent="pipeline", params={"rank": 4})
    for step in steps:
        tracker.log_metrics(GROUP, {"loss": 1 / (step + 1), "accuracy/ink+chalk": step / 10}, step=step)
    tracker.log_artifact(GROUP, figure, "figures")
    tracker.end_run(GROUP)
    tracker.end_run("pipeline")


def read_runs(uri, experiment="demo"):
    """All runs of the experiment by name; a name that two runs carry fails."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return client, {run.info.run_name: run for run in runs}


def history(client, run, key):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def snapshot(uri):
    """Everything that a reader of the store sees, to compare before and after."""
    client, runs = read_runs(uri)
    return {
        name: (run.to_dictionary(), [history(client, run, key) for key in run.data.metrics])
        for name, run in runs.items()
    }


def test_all_kinds_arrive(new_uri, folder, figure, tmp_path):
    uri = new_uri("storage")
    with Tracker(uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure)
        figure.unlink()  # the outbox keeps what was logged
        report = tracker.flush()
    assert (report.waiting, report.refused) == (0, 0) and report.delivered > 0
    assert uri in report.message

    client, runs = read_runs(uri)
    parent, group = runs["pipeline"], runs[GROUP]
    assert group.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert parent.data.tags["config"] == "demo" and parent.data.params["seed"] == "0"
    assert parent.data.params["classes"].endswith("(cut)") and len(parent.data.params["classes"]) == 6000
    assert history(client, group, "loss") == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    assert history(client, group, "accuracy/ink_chalk")[-1] == (2, 0.2)
    [used] = parent.inputs.dataset_inputs
    assert used.dataset.name == "office_demo" and json.loads(used.dataset.profile) == {"images": 40}
    [artifact] = client.list_artifacts(group.info.run_id, "figures")
    assert artifact.path == "figures/affinity.svg"
    assert (tmp_path / "storage" / "mlartifacts").is_dir()


def test_a_replay_changes_nothing(uri, folder, figure):
    with Tracker(uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure)
    journal, snapshot_before = (folder / JOURNAL).read_text(), snapshot(uri)
    for state_is_lost in (False, True):  # then all is sent a second time
        if state_is_lost:
            (folder / PROGRESS).unlink()
        with Tracker(uri, "demo", folder) as tracker:
            log_pipeline(tracker, figure)
        assert (folder / JOURNAL).read_text() == journal
        assert snapshot(uri) == snapshot_before


def test_a_failed_run_is_taken_up_again(uri, folder, figure):
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        tracker.end_run("pipeline", "FAILED")
        tracker.start_run("pipeline")
        tracker.flush()
        assert read_runs(uri)[1]["pipeline"].info.status == "RUNNING"
        tracker.end_run("pipeline")
    assert read_runs(uri)[1]["pipeline"].info.status == "FINISHED"


def test_a_new_uri_gets_everything(uri, new_uri, folder, figure):
    elsewhere = new_uri("elsewhere")
    with Tracker(uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure)
    snapshot_before = snapshot(uri)
    with Tracker(elsewhere, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0
    client, runs = read_runs(elsewhere)
    assert set(runs) == {"pipeline", GROUP} and len(history(client, runs[GROUP], "loss")) == 3
    assert client.list_artifacts(runs[GROUP].info.run_id, "figures")
    with Tracker(uri, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0
        assert snapshot(uri) == snapshot_before
        tracker.log_metrics(GROUP, {"later": 0.5}, step=9)
        assert tracker.flush().refused == 0
    client, runs = read_runs(uri)
    assert history(client, runs[GROUP], "later") == [(9, 0.5)]


def test_an_emptied_store_is_filled_again(new_uri, empty_database, folder, figure, tmp_path):
    uri = new_uri("storage")
    for _ in range(2):
        shutil.copy(empty_database, tmp_path / "storage" / "mlflow.db")
        with Tracker(uri, "demo", folder) as tracker:
            log_pipeline(tracker, figure)
        assert set(read_runs(uri)[1]) == {"pipeline", GROUP}


def test_a_data_set_that_two_runs_store_at_once_is_not_lost(uri, folder, monkeypatch):
    log_inputs, calls = mlflow.MlflowClient.log_inputs, []

    def second_comer(client, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise mlflow.MlflowException("UNIQUE constraint failed: datasets.digest", error_code=4)  # BAD_REQUEST
        return log_inputs(client, *arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", second_comer)
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        tracker.log_dataset("pipeline", **DATASET)
        report = tracker.flush()
    assert (report.waiting, report.refused, len(calls)) == (0, 0, 2)
    assert [used.dataset.name for used in read_runs(uri)[1]["pipeline"].inputs.dataset_inputs] == [
        DATASET["dataset_name"]
    ]


def test_what_is_refused_does_not_hold_up_the_rest(uri, folder, caplog):
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline", params={"seed": 0})
        tracker.log_params("pipeline", {"seed": 1, "depth": 9, "bad//key": 1})
        tracker.log_metrics("pipeline", {f"m{i}": i for i in range(2500)}, step=0)
        tracker.end_run("pipeline")
        report = tracker.flush()
    assert report.waiting == 0 and report.refused == 2 and REFUSED in report.message
    run = read_runs(uri)[1]["pipeline"]
    assert run.data.params == {"seed": "0", "depth": "9"} and len(run.data.metrics) == 2500
    refused = [json.loads(line) for line in (folder / REFUSED).read_text().splitlines()]
    assert [(line["key"], line["value"]) for line in refused] == [("seed", "1"), ("bad//key", "1")]
    assert sum("MLflow refused" in message for message in caplog.messages) == 1


def database_error(error: type, message: str) -> Exception:
    """What MLflow's store makes of an error of its database."""
    from mlflow.store.db.utils import _get_managed_session_maker

    engine = sqlalchemy.create_engine("sqlite://")
    session_maker = _get_managed_session_maker(sqlalchemy.orm.sessionmaker(engine), "sqlite")
    with pytest.raises(mlflow.MlflowException) as caught, session_maker():
        raise error("INSERT", {}, sqlite3.OperationalError(message))
    return caught.value


def http_error(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} of an artifact store", response=response)


KEPT = {
    "full": lambda: database_error(sqlalchemy.exc.OperationalError, "database or disk is full"),
    "read-only": lambda: database_error(sqlalchemy.exc.OperationalError, "attempt to write a readonly database"),
    "failed over": lambda: database_error(sqlalchemy.exc.InternalError, "INSERT in a read-only transaction"),
    **{f"HTTP {status} of a store": partial(http_error, status) for status in (401, 403, 404, 429, 500, 503, 507)},
    **{
        code: lambda code=code: RestException({"error_code": code, "message": "later"})
        for code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "PERMISSION_DENIED")
    },
    "of a proxy": lambda: mlflow.MlflowException("<html>404</html>", error_code=ENDPOINT_NOT_FOUND),
    "local disk": lambda: OSError(28, "No space left on device"),
    "network": lambda: ConnectionError("reset"),
}
REJECTED = {
    "INVALID_PARAMETER_VALUE": lambda: RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "a bad key"}),
    "RESOURCE_DOES_NOT_EXIST": lambda: RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}),
    **{f"HTTP {status} of a store": partial(http_error, status) for status in (400, 413, 422)},
}


@pytest.mark.parametrize(("name", "is_kept"), [*((name, True) for name in KEPT), *((name, False) for name in REJECTED)])
def test_only_what_mlflow_rejects_for_its_content_is_refused(name, is_kept):
    error = (KEPT if is_kept else REJECTED)[name]()
    with pytest.raises(type(error) if is_kept else Refused), _refusals():
        raise error


ANSWERS = {
    "500": (500, b"Internal Server Error", True),
    "503": (503, b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database or disk is full"}', True),
    "507": (507, b"<html>Insufficient Storage</html>", True),
    "400 of a proxy": (400, b"<html>Bad Request</html>", True),
    "404 of a proxy": (404, b"<html>Not Found</html>", True),
    "400": (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "a bad name"}', False),
}


@pytest.fixture(scope="module")
def answering():
    """An HTTP server that reads, and answers the creation of a run with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, b'{"experiment": {"experiment_id": "1", "name": "demo", "lifecycle_stage": "active"}}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(*(self.server.answer if self.path.endswith("runs/create") else (200, b"{}")))

        def answer(self, status, content):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_http_server_cannot_write_is_kept(answering, folder, monkeypatch, name):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, content, is_kept = ANSWERS[name]
    answering.answer = (status, content)
    server = MlflowServer(f"http://127.0.0.1:{answering.server_port}", "demo", folder)
    server.connect()
    assert server.answers()
    with pytest.raises(mlflow.MlflowException if is_kept else Refused):
        server.start_run("key", "run", None, 1)


def test_a_locked_database_prints_one_line(uri, folder, no_pauses, caplog, capfd):
    """Not MLflow's log of each attempt."""
    mlflow_client(uri).search_experiments()
    error = sqlalchemy.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))
    logging.getLogger("mlflow.store.db.utils").exception("SQLAlchemy database error.", exc_info=error)
    assert not caplog.messages and "locked" not in "".join(capfd.readouterr())


def test_an_artifact_whose_copy_was_removed_holds_nothing_up(uri, folder, figure):
    tracker = Tracker("http://127.0.0.1:9", "demo", folder)
    log_pipeline(tracker, figure)
    tracker.close(timeout_s=0)
    shutil.rmtree(folder / "files")
    with Tracker(uri, "demo", folder) as tracker:
        report = tracker.flush()
    assert (report.waiting, report.refused) == (0, 1) and "was removed" in (folder / REFUSED).read_text()
    assert {run.info.status for run in read_runs(uri)[1].values()} == {"FINISHED"}


def test_a_lost_acknowledgement_makes_no_second_run(uri, folder, monkeypatch, no_pauses):
    real = mlflow.MlflowClient.create_run
    lost = []

    def create_and_lose(*args, **kwargs):
        run = real(*args, **kwargs)
        if not lost:
            lost.append(run)
            raise ConnectionError("the answer was lost")
        return run

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", create_and_lose)
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("it's here")
        assert tracker.flush().waiting == 0
    assert read_runs(uri)[1]["it's here"].info.run_id == lost[0].info.run_id


def test_a_deleted_experiment_is_restored(uri, folder):
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("demo"))
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        assert tracker.flush().waiting == 0


# --- levels and ends of runs --------------------------------------------------------------------------------


def parents(uri: str) -> dict[str, str | None]:
    """Run → its parent, by name."""
    _, runs = read_runs(uri)
    name_of = {run.info.run_id: name for name, run in runs.items()}
    return {name: name_of.get(run.data.tags.get("mlflow.parentRunId")) for name, run in runs.items()}


def statuses(uri: str) -> dict[str, str]:
    return {name: run.info.status for name, run in read_runs(uri)[1].items()}


def test_every_run_has_its_own_parent(uri, folder):
    """Three levels, two branches, and a run beside them, begun in any order; also after the outbox's state was lost."""
    expected = {
        "pipeline": None,
        "splits": "pipeline",
        "trainings": "pipeline",
        "group: ink": "trainings",
        "method: grouped": None,
        "group: chalk": "trainings",
        "check": "splits",
    }
    for _ in range(2):
        with Tracker(uri, "demo", folder) as tracker:
            for name, parent in expected.items():
                tracker.start_run(name, parent=parent)
        assert parents(uri) == expected
        (folder / PROGRESS).unlink()


@pytest.fixture(scope="module")
def demo_plan(tmp_path_factory):
    config = parse_config(load_yaml(CONFIGS / "demo.yaml") | {"storage": str(tmp_path_factory.mktemp("demo"))})
    return make_plan(config, Console(quiet=True))


@pytest.fixture
def plan(demo_plan, tmp_path, uri):
    """A new run like that, with MLflow in an empty database."""
    config = demo_plan.config.model_copy(update={"tracking": TrackingConfig(uri=uri, experiment="demo")})
    plan = replace(demo_plan, config=config, storage=Storage.from_folder(tmp_path / "storage"))
    shutil.copytree(demo_plan.folder, plan.folder)
    return plan


def working(plan: Plan) -> AbstractContextManager[Session]:
    """At work on it, not connected to Ray."""
    return run_session(plan, lambda: WorkerResources(1, 0.0), Console(quiet=True))


ENDS = [
    (None, "FINISHED"),
    (UserError("out of memory"), "FAILED"),
    (RuntimeError("a bug"), "FAILED"),
    (KeyboardInterrupt(), "KILLED"),
    (InterruptedError("told to stop"), "KILLED"),  # by the thread that was interrupted
]


@pytest.mark.parametrize(("error", "status"), ENDS, ids=lambda value: type(value).__name__)
def test_a_run_its_stage_and_its_trainings_end_as_the_work_did(plan, uri, error, status):
    """What was finished before stays finished."""
    with suppress(type(error) if error else ()), working(plan) as session:
        with Stage(session, "splits", "1 splits"):
            pass
        with Stage(session, "group_trainings", "5 group trainings"):
            tracker = session.tracker
            for name in ("group: ink", "group: chalk"):
                tracker.start_run(name, parent="group_trainings")
            tracker.end_run("group: ink")
            tracker.start_run("method: zero-shot")
            tracker.end_run("method: zero-shot")
            if error:
                raise error
            tracker.end_run("group: chalk")
    values = statuses(uri)
    assert values.pop(plan.title) == status
    assert values == {
        "splits": "FINISHED",
        "group_trainings": status,
        "group: ink": "FINISHED",
        "group: chalk": status,
        "method: zero-shot": "FINISHED",
    }
    assert set(parents(uri).values()) == {None, plan.title, "group_trainings"}


def test_a_run_that_failed_is_finished_by_the_next_job(plan, uri):
    for error in (UserError("out of memory"), None):
        with suppress(UserError), working(plan) as session:
            with Stage(session, "group_trainings", "5 group trainings"):
                session.tracker.start_run("group: ink", parent="group_trainings")
                if error:
                    raise error
                session.tracker.end_run("group: ink")
        assert set(statuses(uri).values()) == {"FAILED" if error else "FINISHED"}


@pytest.mark.parametrize("content", [None, "", "[]", '{"uri": 1}', '{"database": "mlflow.db"}'])
def test_where_the_runs_of_a_journal_are(tmp_path, folder, monkeypatch, content):
    """In a moved storage its own database; where that is unknown or damaged, the default."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uris = {"mlflow.db": None, "own.db": f"sqlite:///{tmp_path}/old/own.db", "else": "http://anna:secret@127.0.0.1:9"}
    for name, uri in uris.items():
        journal = tmp_path / "old" / name
        open_tracker(TrackingConfig(uri=uri, experiment="e"), tmp_path / "old", journal).close(timeout_s=0)
    (tmp_path / "old").rename(tmp_path / "new")
    targets = {name: read_target(tmp_path / "new", tmp_path / "new" / name) for name in uris}
    assert {target.experiment for target in targets.values()} == {"e"}
    databases = [f"sqlite:///{tmp_path}/new/{name}" for name in ("mlflow.db", "own.db")]
    assert [target.uri for target in targets.values()] == [*databases, "http://127.0.0.1:9"]
    if content is None:
        (tmp_path / "new" / "else" / TARGET).unlink()
    else:
        (tmp_path / "new" / "else" / TARGET).write_text(content)
    assert read_target(tmp_path / "new", tmp_path / "new" / "else") == TrackingConfig()


def test_runs_of_a_killed_job_end(plan, uri, monkeypatch, capsys):
    """As KILLED by `resend`, which no job at work allows; then the same command takes them up. Also those without a
    parent, and those that it does not begin again."""
    journal = plan.folder / f"tracking-{plan.key}"
    with open_tracker(plan.config.tracking, plan.storage.folder, journal) as tracker:  # and no end of any run
        tracker.start_run("pipeline", tags={"mlflow.runName": plan.title})
        for name, parent in (("group_trainings", "pipeline"), ("group: ink", "group_trainings"), ("trial", "pipeline")):
            tracker.start_run(name, parent=parent)
        tracker.start_run("method: grouped")
    (journal / REFUSED).write_text("what an earlier version refused")
    plan.storage.write_marker()

    def resend_main(*arguments) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["resend", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            resend.main()
        return end.value.code, "".join(capsys.readouterr())

    with FileLock(plan.folder / "lock"):
        status, output = resend_main(plan.folder)
        assert status == 1 and "in use by a job" in output
    assert set(statuses(uri).values()) == {"RUNNING"}
    for source in (plan.storage.folder, plan.folder):
        status, output = resend_main(source)
        assert status == 0 and f"{plan.folder}: MLflow has all 11 operations" in output
        assert set(statuses(uri).values()) == {"KILLED"} and len(statuses(uri)) == 5
    with working(plan) as session, Stage(session, "group_trainings", "5 group trainings"):
        session.tracker.start_run("group: ink", parent="group_trainings")
        session.tracker.end_run("group: ink")
    assert statuses(uri) == {
        **dict.fromkeys((plan.title, "group_trainings", "group: ink"), "FINISHED"),
        **dict.fromkeys(("trial", "method: grouped"), "KILLED"),
    }
    status, output = resend_main(plan.storage.folder.parent)
    assert status == 2 and "is neither a storage nor a run of one" in output
    status, output = resend_main(plan.folder, "--tracking.uri", "http://127.0.0.1:9")
    assert status == 2 and "cannot be used" in output


def test_mistakes_of_the_caller_are_named(uri, folder):
    with Tracker(uri, "demo", folder) as tracker:
        with pytest.raises(ValueError, match="start_run"):
            tracker.log_metrics("group: none", {"loss": 1.0}, step=0)
        with pytest.raises(ValueError, match="parent"):
            tracker.start_run("child", parent="nobody")
        tracker.start_run("pipeline")
        with pytest.raises(ValueError, match="DONE"):
            tracker.end_run("pipeline", "DONE")


class Gate:
    """An address that leads to a server; shut, it refuses and breaks connections as a server that was killed does."""

    def __init__(self, target: int):
        (self.port,) = free_ports(1, start=8300)
        self.uri, self._target = f"http://127.0.0.1:{self.port}", target
        self.open()

    def open(self) -> None:
        self._sockets = [socket.create_server(("127.0.0.1", self.port))]
        threading.Thread(target=self._accept, args=self._sockets, daemon=True).start()

    def shut(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, door: socket.socket) -> None:
        with suppress(OSError):
            while True:
                ends = [door.accept()[0], socket.create_connection(("127.0.0.1", self._target))]
                self._sockets += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def gate(uri, tmp_path):
    (port,) = free_ports(1, start=8200)
    server = mlflow_server(tmp_path, port, uri)
    gate = Gate(port)
    yield gate
    gate.shut()
    server.kill()


def test_a_server_that_dies_in_mid_run(gate, folder, figure):
    check_reachable(gate.uri, timeout_s=300)
    with Tracker(gate.uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure, steps=range(2))
        assert tracker.flush().waiting == 0
        contents = read_runs(gate.uri)[1]

        gate.shut()
        with pytest.raises(UserError, match=gate.uri):
            check_reachable(gate.uri, timeout_s=3)
        figure.write_text("<svg>later</svg>")
        log_pipeline(tracker, figure, steps=range(5))
        tracker.start_run("report", parent="pipeline", params={"tables": 3})
        report = tracker.flush(timeout_s=1)
        assert report.waiting > 0 and gate.uri in report.message and str(folder) in report.message

        gate.open()
        assert tracker.flush(timeout_s=300).waiting == 0
    client, runs = read_runs(gate.uri)
    assert {name: run.info.run_id for name, run in contents.items()}.items() <= {
        name: run.info.run_id for name, run in runs.items()
    }.items()
    assert set(runs) == {"pipeline", GROUP, "report"}
    assert [step for step, _ in history(client, runs[GROUP], "loss")] == [0, 1, 2, 3, 4]
    assert runs["report"].data.params == {"tables": "3"}
    copy = client.download_artifacts(runs[GROUP].info.run_id, "figures/affinity.svg")
    assert Path(copy).read_text() == "<svg>later</svg>"


def test_a_server_that_never_answers_holds_nothing_up(uri, folder, figure):
    """It takes connections and says nothing: calls must not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "demo", folder)
        log_pipeline(tracker, figure, steps=range(20))
        report = tracker.close(timeout_s=1)
    assert report.delivered == 0 and report.waiting > 20
    with Tracker(uri, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0


def test_without_a_server_the_next_process_sends_and_passwords_stay_hidden(uri, folder, figure, caplog):
    tracker = Tracker("http://anna:secret@127.0.0.1:9", "demo", folder)
    log_pipeline(tracker, figure)
    report = tracker.close(timeout_s=1)
    assert report.delivered == 0 and report.waiting > 0 and "http://127.0.0.1:9" in report.message
    files = [file.read_text() for file in folder.rglob("*") if file.is_file()]
    assert caplog.messages and not [text for text in (*caplog.messages, *files) if "secret" in text]
    with Tracker(uri, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0
    assert set(read_runs(uri)[1]) == {"pipeline", GROUP}


@pytest.mark.parametrize("bad", ["./mlruns", "file:///data/mlruns", "htp://host:5000", "sqlite://", "http://"])
def test_the_door_names_a_wrong_uri(bad):
    with pytest.raises(UserError, match="sqlite:////folder/mlflow.db"):
        check_reachable(bad)


def test_the_door_hides_the_password_and_makes_the_folder(tmp_path):
    with pytest.raises(UserError) as caught:
        check_reachable("http://anna:secret@127.0.0.1:9", timeout_s=5)
    assert "127.0.0.1:9" in str(caught.value) and "secret" not in str(caught.value)
    check_reachable(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="tracking.uri"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_where_the_uri_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-env:5000")
    assert resolve_tracking_uri(None, tmp_path) == "http://from-env:5000"
    assert resolve_tracking_uri("http://configured:5000", tmp_path) == "http://configured:5000"


@pytest.mark.parametrize("name", ["a%20b #é &;'x", "a?b=c", "100%"])
def test_a_storage_of_any_name_holds_the_database_and_the_artifacts(name, new_uri, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    new_uri(name)
    storage = tmp_path / name
    uri = resolve_tracking_uri(None, storage)
    check_reachable(uri)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.txt").write_text("text")
    server = MlflowServer(uri, "demo", tmp_path / "files")
    server.connect()
    run_id = server.start_run("key", "run", None, 1)
    server.send(run_id, [Operation("artifact", "run", "d/a.txt", "a.txt", 1)])
    server.send(run_id, [Operation("metrics", "run", "m", 2.0, 1)])
    client = mlflow_client(uri)
    assert client.get_run(run_id).data.metrics == {"m": 2}
    downloaded = client.download_artifacts(run_id, "d/a.txt", str(tmp_path / "files"))
    assert Path(downloaded).read_text() == "text"
    with sqlite3.connect(storage / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
    assert {path.name for path in storage.iterdir()} == {"mlflow.db", "mlartifacts"}
    assert {path.name for path in tmp_path.iterdir()} == {name, "files"}
    uri_of_client = client.get_experiment_by_name("demo").artifact_location
    assert unquote(uri_of_client.removeprefix("file://")) == str(storage / "mlartifacts")


def test_the_environment_without_git(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    environment = run_environment()
    assert environment["mlflow"] == mlflow.__version__ and "git_commit" not in environment
    assert all(isinstance(value, str) for value in environment.values())
