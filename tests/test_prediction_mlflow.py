"""A finished run's model in MLflow: registered, loaded back, and served over HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pipelines import QUICK, the_run
from servers import BIN, Server, free_ports

import pipeline
from jobs import register_model, resend
from pipeline.errors import UserError
from pipeline.runtime.tracking.database import prepare_database, sqlite_uri
from pipeline.workflows.run_list import list_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracking_uri(quick_run):
    return f"sqlite:///{quick_run[0]}/mlflow.db"


def run_main(job, monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Return the exit status, and the output or the error message."""
    monkeypatch.setattr(sys, "argv", [job.__name__, *map(str, arguments)])
    status = 0
    try:
        job.main()
    except SystemExit as end:
        status = end.code
    stdout, stderr = capsys.readouterr()
    return status, stderr if status else stdout.strip()


register = partial(run_main, register_model)


def find_images(storage: Path, task: str, count: int) -> list[Path]:
    return sorted((storage / "datasets" / "digits" / task).rglob("*.png"))[:: 400 // count][:count]


def test_a_finished_run_is_registered_once(quick_run, tracking_uri, monkeypatch, capsys):
    folder = the_run(quick_run[0])
    once = partial(register, monkeypatch, capsys, "--run", folder, "--tracking.registered_model", "once")
    assert once("--alias", "here") == (0, "models:/once/1")
    assert once() == (0, "models:/once/1")
    assert once("--threshold", "0.5") == (0, "models:/once/2")
    (parent,) = MlflowClient(tracking_uri).search_runs(["1"], "tags.run_folder != ''")
    assert parent.info.status == "FINISHED"
    assert {v.run_id for v in MlflowClient(tracking_uri).search_model_versions("name='once'")} == {parent.info.run_id}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    images = find_images(quick_run[0], "ink_left", 5)
    expected = pipeline.load(folder).predict(images, "ink_left")
    assert pipeline.load("models:/once@here").predict(images, "ink_left") == expected
    logged = f"runs:/{parent.info.run_id}/adapters/grouped.safetensors"
    assert pipeline.load(logged).predict(images, "ink_left") == expected
    assert pipeline.load("models:/once/2").options.threshold == 0.5
    with pytest.raises(UserError, match="cannot download models:/nothing/1 from MLflow"):
        pipeline.load("models:/nothing/1")


def test_registration_errors_are_reported(quick_run, tmp_path, monkeypatch, capsys):
    folder, model_name = the_run(quick_run[0]), ("--tracking.registered_model", "x")
    for arguments, message in [
        (["--run", folder], "--tracking.registered_model NAME is required"),
        (["--run", tmp_path, *model_name], "is not a run directory"),
        (
            ["--run", folder, *model_name, "--tracking.uri", f"sqlite:///{tmp_path}/other.db"],
            "other.db does not exist",
        ),
        (["--run", folder, *model_name, "--method", "coop"], "coop.safetensors does not exist"),
        (["--run", folder, *model_name, "--threshold", "7"], "threshold=7: must be"),
        (["--run", folder, "--tracking.registered_model", "a/b"], "cannot register the model 'a/b'"),
    ]:
        status, output = register(monkeypatch, capsys, *arguments)
        assert status == 2 and message in output, output


def test_a_moved_storage_works_as_before(quick_run, run_job, tmp_path, monkeypatch, capsys):
    """Also its database, which names the artifacts by absolute paths; nothing is at the old place."""
    previous = shutil.copytree(quick_run[0], tmp_path / "previous")
    prepare_database(sqlite_uri(previous / "mlflow.db"))
    storage = previous.rename(tmp_path / "storage")
    folder, client = the_run(storage), MlflowClient(sqlite_uri(storage / "mlflow.db"))
    moved = register(monkeypatch, capsys, "--run", folder, "--tracking.registered_model", "moved")
    assert moved == (0, "models:/moved/1")
    assert run_main(resend, monkeypatch, capsys, storage)[0] == 0
    assert [run.run for run in list_runs(str(storage), (), None)[0]] == [str(folder)]
    images = find_images(storage, "ink_left", 5)
    expected = pipeline.load(the_run(quick_run[0])).predict(images, "ink_left")
    assert pipeline.load(folder).predict(images, "ink_left") == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(storage / "mlflow.db"))
    assert pipeline.load("models:/moved/1").predict(images, "ink_left") == expected
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    num_runs = len(client.search_runs(["1"]))
    finished = run_job("full_pipeline", "--storage", storage, *QUICK, "--tracking.registered_model", "digits by itself")
    assert finished.status == 0 and finished.output.count("cached (computed in") == 6, finished.output
    (version,) = client.search_model_versions("name='digits by itself'")
    assert int(version.version) == 1 and len(client.search_runs(["1"])) == num_runs
    assert {run.info.status for run in client.search_runs(["1"])} == {"FINISHED"}
    (parent,) = client.search_runs(["1"], "tags.level = 'pipeline'")
    assert parent.info.artifact_uri.startswith((storage / "mlartifacts").as_uri()) and not previous.exists()
    assert Path(client.download_artifacts(parent.info.run_id, "report/report.html")).is_file()


def test_the_served_model_predicts_as_the_loaded_one(quick_run, tracking_uri, tmp_path, monkeypatch, capsys):
    storage, _ = quick_run
    assert register(monkeypatch, capsys, "--run", the_run(storage), "--tracking.registered_model", "served") == (
        0,
        "models:/served/1",
    )
    model = pipeline.load(the_run(storage))
    (port,) = free_ports(1, start=5200)
    server = Server(
        [str(BIN / "mlflow"), "models", "serve", "-m", "models:/served/1", "--env-manager", "local"]
        + ["--host", "127.0.0.1", "--port", str(port)],
        tmp_path / "serve.log",
        {"MLFLOW_TRACKING_URI": tracking_uri, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": ""},
        f"http://127.0.0.1:{port}/ping",
    )
    try:

        def send(*records: dict) -> list[dict]:
            body = json.dumps({"dataframe_records": records}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            return json.loads(urllib.request.urlopen(request, timeout=300).read())["predictions"]

        def encoded(image: bytes) -> str:
            return base64.b64encode(image).decode()

        paths = (*find_images(storage, "ink_right", 3), *find_images(storage, "blur_right", 2))
        images = [path.read_bytes() for path in paths]
        answers = send(*({"image": encoded(image), "task": "ink_right"} for image in images))
        for answer, expected in zip(answers, model.predict(images, "ink_right"), strict=True):
            assert (answer["task"], answer["label"], answer["error"]) == ("ink_right", expected.label, None)
            assert answer["probability"] == pytest.approx(expected.probability, abs=1e-6)
            assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
            assert answer["predictions_by_task"] == []

        for answer, expected in zip(send(*({"image": encoded(i)} for i in images)), model.predict(images), strict=True):
            assert (answer["task"], answer["label"]) == (expected.task, expected.label)
            assert {guess["task"]: guess["label"] for guess in answer["predictions_by_task"]} == {
                task: guess.label for task, guess in expected.predictions_by_task.items()
            }
            scores = {guess["task"]: guess["probability"] for guess in answer["predictions_by_task"]}
            assert scores == pytest.approx(
                {t: guess.probability for t, guess in expected.predictions_by_task.items()}, abs=1e-6
            )

        mixed = send(
            {"image": encoded(images[0]), "task": "blur_right"},
            {"image": encoded(b"no image")},
            {"image": encoded(images[1])},
            {"image": encoded(images[0]), "task": "oil"},
        )
        assert mixed[0]["task"] == "blur_right" and mixed[0]["predictions_by_task"] == []
        assert mixed[1]["label"] is None and mixed[1]["probability"] is None and "supported format" in mixed[1]["error"]
        assert len(mixed[2]["predictions_by_task"]) == 6
        assert "unknown task 'oil'" in mixed[3]["error"]
    finally:
        server.kill()
