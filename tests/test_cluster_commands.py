"""The commands of docker-compose.yml, run as plain processes: what compose would run, at addresses of this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
from compose_file import read_compose_file, read_env_file, words
from mlflow import MlflowClient
from pipelines import PATIENCE_S, REPOSITORY, summary
from servers import BIN, Server, free_ports

from pipeline.methods.registry import DEFAULT_VARIANTS

pytestmark = pytest.mark.fault_injection

SMALL = (
    *("--data.tasks", "[blur_left, blur_right, ink_left]", "--training.epochs", "2", "--global_prompt.epochs", "2"),
    *("--training.checkpoint_every", "1"),
)


class Service(Server):
    """A service's command as a process, which `wait_until_healthy` waits for with the service's own health check."""

    def __init__(self, command: list[str], health_check: list[str], log: Path, env: Mapping[str, str]):
        self.log, self.env = log, dict(env)
        self._health_check = health_check
        self._log = open(log, "ab")
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,  # as the image's working directory, it has jobs/ and configs/
            env=self.env,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while (found := self._check()).returncode:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text() + found.stdout
            time.sleep(0.5)

    def kill(self) -> None:
        if self.process.poll() is None:
            super().kill()
        self._log.close()

    def family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def stop(self, sent_signal: signal.Signals, timeout: float) -> None:
        """As compose stops it: what is left after the time would be killed, and is an error here."""
        family = self.family()
        self.process.send_signal(sent_signal)
        try:
            self.process.wait(timeout)
            assert not psutil.wait_procs(family, timeout=2)[1], "the service leaves processes behind"
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
            self._log.close()

    def _check(self) -> subprocess.CompletedProcess:
        return subprocess.run(
            self._health_check,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Composed:
    """Services of `docker compose --profile gpu up`, with two GPU workers, each with a logical GPU."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Users other than root, and Ray's sockets, need a short and open path.
        self._temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        self._temporary.chmod(0o755)
        self._postgres_bin = postgres_bin()
        subprocess.run([REPOSITORY / "cluster/make_env.sh", folder / ".env"], check=True)
        self.secrets = {key: value for key, value in read_env_file((folder / ".env").read_text()).items() if value}
        self.gcs, self.dashboard, self.client, self.mlflow, self.postgres = free_ports(5, 5600 + os.getpid() % 300)
        self.running: dict[str, Service] = {}

    @property
    def tracking_uri(self) -> str:
        return f"http://127.0.0.1:{self.mlflow}"

    def start(self) -> None:
        """In the order of `depends_on`; Ray's one after the other, since together they starve on few cores."""
        self._start_postgres()
        self._start("mlflow", "mlflow")  # meanwhile
        self._start("head", "head", *self._ray_options(1), f"--ray-client-server-port={self.client}")
        self.running["head"].wait_until_healthy()
        for number, (name, gpus) in enumerate({"worker": 0, "gpu-worker": 1, "gpu-worker-2": 1}.items(), start=2):
            self._start(name, name.removesuffix("-2"), *self._ray_options(number), f"--num-gpus={gpus}", "--num-cpus=1")
            self.running[name].wait_until_healthy()
        self.running["mlflow"].wait_until_healthy()

    def stop(self) -> None:
        for name, service in reversed(self.running.items()):
            if name == "postgres" and service.process.poll() is None:
                service.stop(signal.SIGINT, 60)  # the image's stop signal
            else:
                service.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def command_of(self, service: str, agent: int = 0, **variables: str) -> tuple[list[str], list[str], dict[str, str]]:
        """A service's command, health check and environment, as compose has them, at addresses of this machine."""
        found = read_compose_file({**self.secrets, **variables})["services"][service]
        check = found["healthcheck"].get("test", ["CMD"])
        assert check[0] == "CMD"
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_", "AWS_", "PG")) and name != "PYTHONPATH"
        }
        env |= {"PATH": f"{BIN}:{self._postgres_bin}:{os.environ['PATH']}", "HOME": str(self.folder)}
        env |= {name: self._here(value) for name, value in found["environment"].items() if value is not None}
        command = [*words(found.get("entrypoint")), *words(found.get("command"))]
        return (
            [self._here(word) for word in command],
            [self._here(word, agent) for word in check[1:]],
            env,
        )

    def _start(self, name: str, service: str, *options: str, **variables: str) -> None:
        agent = next((int(option.split("=")[1]) for option in options if "agent-listen-port" in option), 0)
        command, check, env = self.command_of(service, agent, **variables)
        self.running[name] = Service([*command, *options], check, self.folder / f"{name}.log", env)

    def _start_postgres(self) -> None:
        """Environment of the service, as the entrypoint of the image sets it."""
        _, check, env = self.command_of("postgres")
        data, password = self._temporary / "postgres", self._temporary / "password"
        data.mkdir()
        password.write_text(env["POSTGRES_PASSWORD"])
        as_postgres = []
        if os.geteuid() == 0:  # whom PostgreSQL refuses
            user = pwd.getpwnam("postgres")
            as_postgres = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            for path in (data, password):
                os.chown(path, user.pw_uid, user.pw_gid)
        subprocess.run(
            [*as_postgres, "initdb", f"--pgdata={data}", f"--username={env['POSTGRES_USER']}", f"--pwfile={password}"]
            + ["--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"],
            env=env,
            cwd=self._temporary,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        password.unlink()
        settings = {"listen_addresses": "127.0.0.1", "port": self.postgres, "unix_socket_directories": ""}
        command = [*as_postgres, "postgres", "-D", str(data)]
        command += [f"--{name}={value}" for name, value in settings.items()]
        self.running["postgres"] = Service(command, check, self.folder / "postgres.log", env)
        self.running["postgres"].wait_until_healthy()
        with closing(self.database("postgres")) as connection:
            connection.autocommit = True  # it does not go inside a transaction
            connection.cursor().execute(f"CREATE DATABASE {env['POSTGRES_DB']}")

    def database(self, name: str = "mlflow"):
        return psycopg2.connect(
            host="127.0.0.1",
            port=self.postgres,
            user="mlflow",
            password=self.secrets["POSTGRES_PASSWORD"],
            dbname=name,
        )

    def _ray_options(self, number: int) -> list[str]:
        (agent,) = free_ports(1, start=9300 + 20 * number)
        # Not 127.0.0.1, in place of which Ray takes the machine's address.
        options = [f"--node-ip-address=127.0.0.{number + 1}", f"--dashboard-agent-listen-port={agent}"]
        return options + ([f"--temp-dir={self._temporary / 'ray'}"] if number == 1 else [])

    def _here(self, text: str, agent: int = 0) -> str:
        for there, here in {
            "http://head:8265": f"http://127.0.0.1:{self.dashboard}",
            "head:6379": f"127.0.0.2:{self.gcs}",
            "--port=6379": f"--port={self.gcs}",
            "--dashboard-host=0.0.0.0": "--dashboard-host=127.0.0.1",
            "--dashboard-port=8265": f"--dashboard-port={self.dashboard}",
            "127.0.0.1:8265": f"127.0.0.1:{self.dashboard}",
            "127.0.0.1:52365": f"127.0.0.1:{agent}",
            "--object-store-memory=1000000000": "--object-store-memory=100000000",
            "http://mlflow:5000": self.tracking_uri,
            "127.0.0.1:5000": f"127.0.0.1:{self.mlflow}",
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={self.mlflow}",
            "--port=5432": f"--port={self.postgres}",
            "/mlflow/artifacts": str(self.folder / "artifacts"),
            "/shared": str(self.folder / "shared"),
        }.items():
            text = text.replace(there, here)
        return {"postgres": "127.0.0.1", "5432": str(self.postgres)}.get(text, text)


def postgres_bin() -> Path:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if not folders:
        pytest.skip("no PostgreSQL on this machine: apt-get install postgresql")
    return folders[-1]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    cluster = Composed(tmp_path_factory.mktemp("composed"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def status(url: str, **headers: str) -> int:
    """Status of a GET, or of a POST with an Origin."""
    data = b"{}" if "Origin" in headers else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def submit(composed: Composed, *options: str, **env: str) -> subprocess.Popen:
    """`docker compose run --rm submit python jobs/full_pipeline.py --storage /shared/runs ...`"""
    command, _, environment = composed.command_of("submit")
    return subprocess.Popen(
        [*command, *options],
        cwd=composed.folder,
        env={**environment, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def submitted(composed):
    """Outputs of a job that outlives its tracking server, and of the same job with a server again."""
    job = submit(composed, *SMALL)
    while not list(composed.folder.glob("shared/runs/global_prompt/.staging-*")):
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.1)
    composed.running.pop("mlflow").kill()
    outlived = job.communicate(timeout=PATIENCE_S)[0]
    assert job.returncode == 0, outlived
    composed._start("mlflow", "mlflow")
    composed.running["mlflow"].wait_until_healthy()
    job = submit(composed, *SMALL)
    repeated = job.communicate(timeout=PATIENCE_S)[0]
    assert job.returncode == 0, repeated
    return outlived, repeated


def test_a_submitted_job_outlives_its_tracking_server(composed, submitted):
    outlived, repeated = submitted
    assert f"MLflow at {composed.tracking_uri} lacks" in outlived and " lacks " not in repeated, outlived
    assert repeated.count("cached (computed in") == 7, repeated
    for output in submitted:
        assert "succeeded" in output and "View run" not in output

    client = MlflowClient(composed.tracking_uri)
    experiment = client.get_experiment_by_name("mmap-clip")
    runs = client.search_runs([experiment.experiment_id])
    assert all(run.info.status == "FINISHED" for run in runs)
    (parent,) = [run for run in runs if run.data.tags["level"] == "pipeline"]
    for method, values in summary(composed.folder / "shared" / "runs")["methods"].items():
        assert parent.data.metrics[f"accuracy/{method}/average"] == pytest.approx(values["average"])
    (training,) = [run for run in runs if run.data.tags["mlflow.runName"] == "all in one"]
    history = client.get_metric_history(training.info.run_id, "train_loss/blur_right")
    assert [value.step for value in history] == list(range(1, 7))  # of 2 epochs
    prompts = {file.path for file in client.list_artifacts(parent.info.run_id, "adapters")}
    assert prompts == {f"adapters/{name}.safetensors" for name in DEFAULT_VARIANTS}
    # The server itself has them, not a folder that happens to be shared.
    assert {path.name for path in (composed.folder / "artifacts").rglob("adapters/*")} == {
        f"{name}.safetensors" for name in DEFAULT_VARIANTS
    }
    with closing(composed.database()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
        assert cursor.fetchone() == (len(runs),)


def test_who_has_no_token_is_refused(composed):
    jobs = f"http://127.0.0.1:{composed.dashboard}/api/jobs/"
    assert status(jobs) == 401
    assert status(jobs, Authorization="Bearer of-bad-news") == 403
    assert status(jobs, Authorization=f"Bearer {composed.secrets['RAY_AUTH_TOKEN']}") == 200
    refused = submit(composed, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert "Missing authentication token" in refused.communicate(timeout=PATIENCE_S)[0]
    assert refused.returncode != 0
    command, _, env = composed.command_of("worker")
    command = [*command, "--node-ip-address=127.0.0.9", "--num-cpus=1"]
    worker = subprocess.run(
        command,
        env=env | {"RAY_AUTH_TOKEN": "of-bad-news"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert worker.returncode != 0
    assert "InvalidAuthToken" in worker.stdout


def test_a_dump_of_the_database_brings_the_runs_back(composed, submitted):
    _, _, env = composed.command_of("postgres")
    address = ["--host=127.0.0.1", f"--port={composed.postgres}", "--username=mlflow"]
    env |= {"PGPASSWORD": composed.secrets["POSTGRES_PASSWORD"]}
    dumped = ["pg_dump", *address, "--format=custom", "mlflow"]
    dump = subprocess.run(dumped, env=env, check=True, stdout=subprocess.PIPE).stdout
    with closing(composed.database()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM metrics")
        (before,) = cursor.fetchone()
        cursor.execute("DELETE FROM metrics")
        connection.commit()
        restore = ["pg_restore", *address, "--dbname=mlflow", "--clean", "--if-exists"]
        subprocess.run(restore, env=env, check=True, input=dump)
        cursor.execute("SELECT count(*) FROM metrics")
        assert cursor.fetchone() == (before,) and before > 0
    _, _, env = composed.command_of("mlflow")
    subprocess.run(["mlflow", "db", "upgrade", "postgresql+psycopg2:///mlflow"], env=env, check=True)


def test_mlflow_survives_a_pause(composed):
    """As on a starved CPU: what serves runs not for longer than uvicorn waits for its workers, and is not killed."""
    family = composed.running["mlflow"].family()
    serving = [process for process in family if not process.children()]
    for process in serving:
        process.suspend()
    time.sleep(7)  # uvicorn looks every half second, and waits for 5
    assert all(process.is_running() for process in serving), "a process that did not answer was killed"
    for process in serving:
        process.resume()
    composed.running["mlflow"].wait_until_healthy()
    assert composed.running["mlflow"].family() == family


def test_mlflow_refuses_foreign_hosts_and_pages(composed):
    experiments = f"{composed.tracking_uri}/api/2.0/mlflow/experiments"
    search, create = f"{experiments}/search?max_results=1", f"{experiments}/create"
    assert status(search, Host="mlflow:5000") == 200
    assert status(search, Host="elsewhere.example:5000") == 403
    assert status(create, Origin="http://elsewhere.example") == 403
    assert status(create, Origin="http://localhost:5000") == 400  # it has no name, and is looked at


def test_what_compose_publishes_listens_on_this_machine_only(composed):
    """Ray's other ports compose leaves inside the containers' network."""
    listening = {
        connection.laddr
        for service in composed.running.values()
        for process in service.family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    for url in (composed.tracking_uri, f"http://127.0.0.1:{composed.dashboard}"):
        assert {address.ip for address in listening if address.port == urlsplit(url).port} == {"127.0.0.1"}


def test_mlflow_requires_passwords_if_configured(composed):
    """Behind the tests that ask it without one."""
    composed.running.pop("mlflow").stop(signal.SIGTERM, 10)
    composed._start("mlflow", "mlflow", MLFLOW_APP="basic-auth")
    composed.running["mlflow"].wait_until_healthy()
    search = f"{composed.tracking_uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(search) == 401
    for password, expected in (("wrong", 401), (composed.secrets["MLFLOW_ADMIN_PASSWORD"], 200)):
        credentials = b64encode(f"admin:{password}".encode()).decode()
        assert status(search, Authorization=f"Basic {credentials}") == expected
    # Jobs have the password.
    _, _, env = composed.command_of("submit")
    assert (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"]) == (
        "admin",
        composed.secrets["MLFLOW_ADMIN_PASSWORD"],
    )


def test_a_worker_ends_on_sigterm(composed):
    composed.running.pop("worker").stop(signal.SIGTERM, 30)
