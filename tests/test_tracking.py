"""The outbox against a real MLflow: a SQLite store, and a server that is killed and started again."""

import json
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from servers import free_ports, mlflow_server

from pipeline.config import CONFIGS, TrackingConfig, load_yaml, parse_config
from pipeline.errors import UserError
from pipeline.runtime import tracking
from pipeline.runtime.run import check_run, tracked
from pipeline.runtime.stage import Stage
from pipeline.runtime.tracking import Tracker, check_reachable, resolve_tracking_uri

mlflow = pytest.importorskip("mlflow")

GROUP = "group: ink+chalk"
DATASET = {"dataset_name": "office_demo", "digest": "d" * 64, "source": "/data/office_demo"}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow's schema takes seconds to make: once, then copied."""
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    tracking.mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def new_uri(empty_database, tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        shutil.copy(empty_database, tmp_path / name / "mlflow.db")
        return f"sqlite:///{tmp_path / name / 'mlflow.db'}"

    return make


@pytest.fixture
def uri(new_uri):
    return new_uri("storage")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pipeline-1a2b3c"


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "affinity.svg"
    path.write_text("<svg/>")
    return path


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


def test_all_kinds_arrive(uri, folder, figure, tmp_path):
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
    journal, first = (folder / "journal.jsonl").read_text(), snapshot(uri)
    for state_is_lost in (False, True):  # then all is sent a second time
        if state_is_lost:
            (folder / "delivery.json").unlink()
        with Tracker(uri, "demo", folder) as tracker:
            log_pipeline(tracker, figure)
        assert (folder / "journal.jsonl").read_text() == journal
        assert snapshot(uri) == first


def test_a_failed_run_is_taken_up_again(uri, folder, figure):
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        tracker.end_run("pipeline", "FAILED")
        tracker.start_run("pipeline")
        tracker.flush()
        assert read_runs(uri)[1]["pipeline"].info.status == "RUNNING"
        tracker.end_run("pipeline")
    assert read_runs(uri)[1]["pipeline"].info.status == "FINISHED"


def test_half_a_line_is_dropped(uri, folder, figure):
    with Tracker(uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure, steps=range(2))
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"op": "metrics", "run": "gro')
    with Tracker(uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure, steps=range(3))
    for line in (folder / "journal.jsonl").read_text().splitlines():
        json.loads(line)
    client, runs = read_runs(uri)
    assert [step for step, _ in history(client, runs[GROUP], "loss")] == [0, 1, 2]


def test_a_new_uri_gets_everything(uri, new_uri, folder, figure):
    elsewhere = new_uri("elsewhere")
    with Tracker(uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure)
    first = snapshot(uri)
    with Tracker(elsewhere, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0
    client, runs = read_runs(elsewhere)
    assert set(runs) == {"pipeline", GROUP} and len(history(client, runs[GROUP], "loss")) == 3
    assert client.list_artifacts(runs[GROUP].info.run_id, "figures")
    with Tracker(uri, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0
    assert snapshot(uri) == first


def test_an_emptied_store_is_filled_again(uri, empty_database, folder, figure, tmp_path):
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
    assert report.waiting == 0 and report.refused == 1 and "refused.jsonl" in report.message
    run = read_runs(uri)[1]["pipeline"]
    assert run.data.params == {"seed": "0", "depth": "9"} and len(run.data.metrics) == 2500
    refused = [json.loads(line)["values"] for line in (folder / "refused.jsonl").read_text().splitlines()]
    assert refused == [{"seed": "1"}, {"bad//key": "1"}]
    assert sum("MLflow refused" in message for message in caplog.messages) == 1


def test_values_of_several_requests_arrive_whole(uri, folder, monkeypatch):
    monkeypatch.setattr(tracking, "BATCH_LIMITS", dict.fromkeys(tracking.BATCH_LIMITS, 5))
    values = {f"name{number}": number for number in range(12)}
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        tracker.log_params("pipeline", values)
        tracker.log_metrics("pipeline", values, step=1)
        tracker.log_metrics("pipeline", values, step=2)
        tracker.end_run("pipeline")
        report = tracker.flush()
    assert (report.waiting, report.refused) == (0, 0)
    client, runs = read_runs(uri)
    run = runs["pipeline"]
    assert run.data.params == {name: str(value) for name, value in values.items()}
    assert run.data.metrics.keys() == values.keys()
    for name, value in values.items():
        assert history(client, run, name) == [(1, value), (2, value)]


def test_what_always_fails_is_given_up(uri, folder, monkeypatch):
    monkeypatch.setattr(tracking, "GIVE_UP_AFTER", 3)
    monkeypatch.setattr(tracking, "FIRST_PAUSE_S", 0.05)
    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        tracker.flush()

        def broken(*args, **kwargs):
            raise RuntimeError("a bug in the server")

        monkeypatch.setattr(tracker._client, "log_inputs", broken)
        tracker.log_dataset("pipeline", **DATASET)
        tracker.end_run("pipeline")
        report = tracker.flush()
    assert (report.waiting, report.refused) == (0, 1)
    assert read_runs(uri)[1]["pipeline"].info.status == "FINISHED"


def test_a_lost_acknowledgement_makes_no_second_run(uri, folder, monkeypatch):
    monkeypatch.setattr(tracking, "FIRST_PAUSE_S", 0.05)
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
        (folder / "delivery.json").unlink()


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """Checked, and not connected to Ray."""
    config = parse_config(load_yaml(CONFIGS / "demo.yaml") | {"storage": str(tmp_path_factory.mktemp("demo"))})
    return check_run(config, Console(quiet=True))


@pytest.fixture
def checked_run(demo_run, tmp_path, uri):
    """A new run like that, with MLflow in an empty database."""
    shutil.copytree(demo_run.folder, tmp_path / "run")
    tracking = TrackingConfig(uri=uri, experiment="demo")
    return replace(demo_run, config=demo_run.config.model_copy(update={"tracking": tracking}), folder=tmp_path / "run")


ENDS = [
    (None, "FINISHED"),
    (UserError("out of memory"), "FAILED"),
    (RuntimeError("a bug"), "FAILED"),
    (KeyboardInterrupt(), "KILLED"),
    (InterruptedError("told to stop"), "KILLED"),  # by the thread that was interrupted
]


@pytest.mark.parametrize(("error", "status"), ENDS, ids=lambda value: type(value).__name__)
def test_a_run_its_stage_and_its_trainings_end_as_the_work_did(checked_run, uri, error, status):
    """What was finished before stays finished."""
    with suppress(type(error) if error else ()), tracked(checked_run):
        with Stage(checked_run, "splits", "1 splits"):
            pass
        with Stage(checked_run, "group_trainings", "4 group trainings"):
            tracker = checked_run.tracker
            for name in ("group: ink", "group: chalk"):
                tracker.start_run(name, parent="group_trainings")
            tracker.end_run("group: ink")
            tracker.start_run("method: zero-shot")
            tracker.end_run("method: zero-shot")
            if error:
                raise error
            tracker.end_run("group: chalk")
    found = statuses(uri)
    assert found.pop(checked_run.title) == status
    assert found == {
        "splits": "FINISHED",
        "group_trainings": status,
        "group: ink": "FINISHED",
        "group: chalk": status,
        "method: zero-shot": "FINISHED",
    }
    assert set(parents(uri).values()) == {None, checked_run.title, "group_trainings"}


def test_a_run_that_failed_is_finished_by_the_next_job(checked_run, uri):
    for error in (UserError("out of memory"), None):
        with suppress(UserError), tracked(checked_run):
            with Stage(checked_run, "group_trainings", "4 group trainings"):
                checked_run.tracker.start_run("group: ink", parent="group_trainings")
                if error:
                    raise error
                checked_run.tracker.end_run("group: ink")
        assert set(statuses(uri).values()) == {"FAILED" if error else "FINISHED"}


def test_mistakes_of_the_caller_are_named(uri, folder):
    with Tracker(uri, "demo", folder) as tracker:
        with pytest.raises(ValueError, match="start_run"):
            tracker.log_metrics("group: none", {"loss": 1.0}, step=0)
        with pytest.raises(ValueError, match="parent"):
            tracker.start_run("child", parent="nobody")
        tracker.start_run("pipeline")
        with pytest.raises(ValueError, match="DONE"):
            tracker.end_run("pipeline", "DONE")


class TrackingServer:
    """An `mlflow server` that can be killed and started again at the same address."""

    def __init__(self, store: str, folder: Path):
        (self.port,) = free_ports(1, first=8200)
        self.uri, self._store, self._folder = f"http://127.0.0.1:{self.port}", store, folder
        self.start()

    def start(self) -> None:
        self._server = mlflow_server(self._folder, self.port, self._store)

    def kill(self) -> None:
        self._server.kill()


@pytest.fixture
def server(uri, tmp_path):
    server = TrackingServer(uri, tmp_path)
    yield server
    server.kill()


def test_a_server_that_dies_in_mid_run(server, folder, figure):
    check_reachable(server.uri, timeout_s=300)
    with Tracker(server.uri, "demo", folder) as tracker:
        log_pipeline(tracker, figure, steps=range(2))
        assert tracker.flush().waiting == 0
        before = read_runs(server.uri)[1]

        server.kill()
        with pytest.raises(UserError, match=server.uri):
            check_reachable(server.uri, timeout_s=3)
        figure.write_text("<svg>later</svg>")
        log_pipeline(tracker, figure, steps=range(5))
        tracker.start_run("report", parent="pipeline", params={"tables": 3})
        report = tracker.flush(timeout_s=1)
        assert report.waiting > 0 and server.uri in report.message and str(folder) in report.message

        server.start()
        assert tracker.flush(timeout_s=300).waiting == 0
    client, runs = read_runs(server.uri)
    assert {name: run.info.run_id for name, run in before.items()}.items() <= {
        name: run.info.run_id for name, run in runs.items()
    }.items()
    assert set(runs) == {"pipeline", GROUP, "report"}
    assert [step for step, _ in history(client, runs[GROUP], "loss")] == [0, 1, 2, 3, 4]
    assert runs["report"].data.params == {"tables": "3"}
    kept = client.download_artifacts(runs[GROUP].info.run_id, "figures/affinity.svg")
    assert Path(kept).read_text() == "<svg>later</svg>"


def test_a_server_that_never_answers_holds_nothing_up(uri, folder, figure):
    """It takes connections and says nothing: calls must not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "demo", folder)
        log_pipeline(tracker, figure, steps=range(20))
        report = tracker.close(timeout_s=1)
    assert report.delivered == 0 and report.waiting > 20
    with Tracker(uri, "demo", folder) as tracker:
        assert tracker.flush().waiting == 0


def test_without_a_server_the_next_process_sends(uri, folder, figure):
    nowhere = "http://127.0.0.1:9"
    tracker = Tracker(nowhere, "demo", folder)
    log_pipeline(tracker, figure)
    report = tracker.close(timeout_s=1)
    assert report.delivered == 0 and report.waiting > 0 and nowhere in report.message
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


def test_the_environment_without_git(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    found = tracking.run_environment()
    assert found["mlflow"] == mlflow.__version__ and "git_commit" not in found
    assert all(isinstance(value, str) for value in found.values())


def test_a_full_disk_is_named_and_leaves_the_journal_whole(uri, folder, figure, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Tracker(uri, "demo", folder) as tracker:
        tracker.start_run("pipeline")
        before = (folder / "journal.jsonl").read_bytes()
        for name in ("shutil.copyfile", "os.fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(name, full)
                with pytest.raises(UserError, match="cannot .*No space left on device; free some space"):
                    tracker.log_artifact("pipeline", figure)
            assert (folder / "journal.jsonl").read_bytes() == before
        tracker.log_artifact("pipeline", figure)
        tracker.end_run("pipeline")
        assert tracker.flush().waiting == 0
    client, runs = read_runs(uri)
    assert [file.path for file in client.list_artifacts(runs["pipeline"].info.run_id)] == ["affinity.svg"]
