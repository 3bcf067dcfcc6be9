"""The pipeline as a submitted Ray job on a running cluster, with an MLflow server that dies on the way."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient
from pipelines import QUICK, REPOSITORY, summary
from ray.cluster_utils import Cluster

from pipeline.errors import UserError
from pipeline.run import check_shared

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


class Server:
    """A program in its own session, with all that it starts; `kill` ends them by their ids."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], ready: str):
        self._log = open(log, "ab")
        self.process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, **env},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + 90
        while not answers(ready):
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        self.process.wait()
        assert not psutil.wait_procs(family, timeout=20)[1]
        self._log.close()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int, first: int) -> list[int]:
    """Below the range that Ray gives its workers. Ray binds some ports late: others must ask from another `first`."""
    ports: list[int] = []
    for port in range(first, first + 1000, 7):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                ports.append(port)
            except OSError:
                continue
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


@pytest.fixture
def ray_head(tmp_path):
    gcs, dashboard, agent, client = free_ports(4, first=6500)
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # socket paths below tmp_path would be too long
    address = f"http://127.0.0.1:{dashboard}"
    head = Server(
        [
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            "--num-gpus=1",  # a logical one, which two trainings at a time share
            "--port",
            str(gcs),
            "--dashboard-port",
            str(dashboard),
            "--dashboard-agent-listen-port",
            str(agent),
            "--ray-client-server-port",
            str(client),
            "--temp-dir",
            str(temporary),
        ],
        tmp_path / "ray.log",
        {"PATH": f"{BIN}:{os.environ['PATH']}"},
        f"{address}/api/version",
    )
    yield address
    head.kill()
    shutil.rmtree(temporary, ignore_errors=True)


def mlflow_server(folder: Path, port: int) -> Server:
    return Server(
        [
            str(BIN / "mlflow"),
            "server",
            "--workers",
            "1",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--backend-store-uri",
            f"sqlite:///{folder}/server.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ],
        folder / "mlflow.log",
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": f"{BIN}:{os.environ['PATH']}"},
        f"http://127.0.0.1:{port}/health",
    )


def submit(address: str, *entrypoint: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", *entrypoint],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
    )


def test_every_node_must_see_storage_and_data(tmp_path):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        with pytest.raises(UserError, match="node .* does not see /nowhere/data: `storage`, `data.root`"):
            ray.init(address=cluster.address, log_to_driver=False)
            check_shared(tmp_path, [tmp_path])
            check_shared(tmp_path, [Path("/nowhere/data")])
        assert not list(tmp_path.iterdir())
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_submitted_job_outlives_its_tracking_server(ray_head, tmp_path):
    storage, (port,) = tmp_path / "storage", free_ports(1, first=8500)
    uri = f"http://127.0.0.1:{port}"
    options = ["--storage", str(storage), "--tracking.uri", uri, "--cluster.gpus_per_training", "0.5", *QUICK]

    server = mlflow_server(tmp_path, port)
    job = submit(ray_head, "python", "jobs/full_pipeline.py", *options)
    try:
        while not list(storage.glob("global_prompt/.building-*")):
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.1)
    finally:
        server.kill()
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    assert uri in output and "wait" in output, output
    expected = summary(storage)["methods"]

    server = mlflow_server(tmp_path, port)
    try:
        job = submit(ray_head, "jobs/full_pipeline.py", *options)  # by its shebang
        output = job.communicate(timeout=240)[0]
        assert job.returncode == 0, output
        assert output.count("found finished") == 4
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("mmap-clip")
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert all(run.info.status == "FINISHED" for run in runs)
        for method, values in expected.items():
            assert parent.data.metrics[f"accuracy/{method}/average"] == pytest.approx(values["average"])
        (training,) = [run for run in runs if run.data.tags["mlflow.runName"] == "all in one"]
        history = client.get_metric_history(training.info.run_id, "train_loss/ink")
        assert [value.step for value in history] == list(range(1, len(history) + 1)) and len(history) == 60
        assert {file.path for file in client.list_artifacts(parent.info.run_id, "prompts")} == {
            "prompts/all_in_one.safetensors",
            "prompts/grouped.safetensors",
        }
    finally:
        server.kill()
