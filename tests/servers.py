"""Servers for tests: a Ray cluster, MLflow, S3, and job submission; each ended by its processes' ids."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from pipelines import PATIENCE_S

BIN = Path(sys.executable).parent


class Server:
    """A program in its own session, with all that it starts; `kill` ends them by their ids."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], ready: str):
        """`ready`: an address that answers when the program is up."""
        self._log = open(log, "ab")
        self.process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, **env},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + PATIENCE_S
        while not answers(ready):
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self._log.closed:
            return
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        self.process.wait()
        assert not psutil.wait_procs(family, timeout=60)[1]
        self._log.close()


def in_a_mount_namespace(empty: Path) -> list[str]:
    """Prefix of a command that sees an empty disk at a folder; skips the test where that takes rights it lacks."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make mount namespaces")
    return ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none '{empty}' && exec \"$@\"", "sh"]


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int, start: int) -> list[int]:
    """Below the range that Ray gives its workers. Ray binds some ports late: others must ask from another `start`.
    Processes of pytest-xdist get ports of their own."""
    ports: list[int] = []
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in range(start + (number - start) % 7, start + 1000, 7):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                ports.append(port)
            except OSError:
                continue
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


class RayCluster:
    """A Ray head and nodes on addresses of their own, as `ray start` makes them on machines of their own."""

    def __init__(self, folder: Path, num_cpus: int = 2, num_gpus: int = 0, dashboard: bool = False):
        """`dashboard`: for Ray Train; its ten processes take long to start."""
        if " " in sys.executable:
            pytest.skip("Ray starts the workers of a cluster's jobs by a shell, which cannot find a Python with spaces")
        self._folder, self._has_dashboard = folder, dashboard
        # Socket paths below a test's folder would be too long.
        self._temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        self._gcs, self._dashboard, client = free_ports(3, start=6500 + os.getpid() % 700)
        self.gcs = f"127.0.0.1:{self._gcs}"
        self.nodes: list[Server] = []
        self._client = client
        self.head = self.start_head(num_cpus, num_gpus)

    def start_head(self, num_cpus: int = 2, num_gpus: int = 0) -> Server:
        """Also again, after the one before was killed."""
        self.head = self._start(
            1,
            ["--head", f"--port={self._gcs}", f"--dashboard-port={self._dashboard}"]
            + [f"--include-dashboard={self._has_dashboard}"]
            + [f"--ray-client-server-port={self._client}", f"--temp-dir={self._temporary}"],
            num_cpus,
            num_gpus,
            # A node that is killed is noticed within seconds; one that is slow to answer has Ray's 10 s.
            {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"},
        )
        return self.head

    def add_node(
        self, num_cpus: int = 2, num_gpus: int = 0, env: Mapping[str, str] = {}, prefix: Sequence[str] = ()
    ) -> Server:
        """`prefix`: a command that runs the command behind it."""
        number = len(self.nodes) + 2
        self.nodes.append(self._start(number, [f"--address={self.gcs}"], num_cpus, num_gpus, env, prefix))
        return self.nodes[-1]

    def stop(self) -> None:
        for server in (*self.nodes, self.head):
            server.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(
        self,
        number: int,
        options: list[str],
        num_cpus: int,
        num_gpus: int,
        env: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> Server:
        (agent,) = free_ports(1, start=7600 + 20 * number)
        command = [*prefix, str(BIN / "ray"), "start", "--block", *options, f"--node-ip-address=127.0.0.{number}"]
        command += [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", f"--dashboard-agent-listen-port={agent}"]
        command += ["--object-store-memory=150000000", "--disable-usage-stats"]
        health = f"http://127.0.0.{number}:{agent}/api/local_raylet_healthz"
        is_dashboard = number == 1 and self._has_dashboard
        attempts = 3
        while True:
            attempts -= 1
            try:
                return Server(
                    command,
                    self._folder / f"ray-{number}.log",
                    {"PATH": f"{BIN}:{os.environ['PATH']}", **env},
                    f"http://127.0.0.1:{self._dashboard}/api/version" if is_dashboard else health,
                )
            except AssertionError as error:
                # Ray gives a node 30 s to start, and a busy machine may need more.
                if not attempts or "timed out during startup" not in str(error):
                    raise


def mlflow_server(folder: Path, port: int, store: str | None = None) -> Server:
    """`store`: URI of the database; None: one in `folder`."""
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
            store or f"sqlite:///{folder}/server.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ],
        folder / "mlflow.log",
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": f"{BIN}:{os.environ['PATH']}"},
        f"http://127.0.0.1:{port}/health",
    )


class S3Server(Server):
    """moto's server of S3, with one bucket at `uri`; conftest.py sets credentials that it takes."""

    def __init__(self, folder: Path, port: int):
        address = f"http://127.0.0.1:{port}"
        self.uri = f"s3://bucket?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1"
        super().__init__(
            [str(BIN / "moto_server"), "--host", "127.0.0.1", "--port", str(port)], folder / "s3.log", {}, address
        )
        request = urllib.request.Request(f"{address}/bucket", method="PUT")
        assert urllib.request.urlopen(request).status == 200
