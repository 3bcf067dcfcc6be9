"""The image and docker-compose.yml in real containers: the demo, kills of each service, backup, restore, upgrade.

It takes a Docker daemon of its own and minutes to build the image, so it is asked for: `TEST_CONTAINERS=1 pytest -m
fault_injection tests/test_containers.py`.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from breaking import checkpoints
from docker_engine import Engine, engine_with_images
from golden import DEMO, differences, read_numbers
from pipelines import PATIENCE_S, REPOSITORY, numbers

pytestmark = [
    pytest.mark.fault_injection,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.environ.get("TEST_CONTAINERS"), reason="builds images for minutes: TEST_CONTAINERS=1"),
]
SERVICES = ("head", "worker", "mlflow", "postgres")
JOB = ("python", "jobs/full_pipeline.py", "--training.checkpoint_every", "1", "--cluster.wait_for_nodes_s", "300")
OPEN_FILES = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
"""As many as compose asks for, if this machine has them."""
COUNT_RUNS = """
import collections, mlflow, sys
runs = mlflow.MlflowClient(sys.argv[1]).search_runs(["1"], max_results=10000)
print(sorted(collections.Counter((run.data.tags["mlflow.runName"], run.info.status) for run in runs).items()))
"""
EVERY_STEP_ONCE = """
import sys
from pathlib import Path
from pipelines import every_step_once
sys.exit(not every_step_once(Path(sys.argv[2]), sys.argv[1]))
"""


class Composed:
    """`docker compose up` with a folder of this machine as /shared."""

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.shared = engine, folder / "shared"
        self.shared.mkdir()
        os.chown(self.shared, 1000, 1000)
        for path in (self.shared, *self.shared.parents):  # of pytest's folders only their owner gets in
            if path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 1:
                path.chmod(path.stat().st_mode | 0o11)
        subprocess.run([REPOSITORY / "cluster/make_env.sh", folder / ".env"], check=True)
        with open(folder / ".env", "a") as file:
            file.write(f"SHARED={self.shared}\nOPEN_FILES={OPEN_FILES}\n")
        self._options = ("--env-file", folder / ".env", "--file", "docker-compose.yml")

    def compose(self, *arguments: str | Path, **options) -> subprocess.CompletedProcess:
        return self.engine.docker("compose", *self._options, *arguments, cwd=REPOSITORY, **options)

    def up(self) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", str(PATIENCE_S))

    def execute(self, service: str, *command: str, **options) -> subprocess.CompletedProcess:
        return self.compose("exec", "-T", service, *command, **options)

    def submit(self, storage: str) -> subprocess.Popen:
        """`docker compose run --rm submit`"""
        command = ["docker", "compose", *self._options, "run", "--rm", "-T", "submit", *JOB]
        return subprocess.Popen(
            [*command, "--storage", f"/shared/{storage}"],
            cwd=REPOSITORY,
            env=self.engine.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, service: str) -> None:
        """Kills a service, and waits until it has been restarted."""
        container = self.compose("ps", "--quiet", service).stdout.strip()
        asked = ("inspect", "--format={{.RestartCount}} {{.State.Health.Status}}", container)
        restarts = int(self.engine.docker(*asked).stdout.split()[0])
        self.engine.kill(container)
        wait_until(lambda: self.engine.docker(*asked).stdout.split() == [str(restarts + 1), "healthy"])

    def ask_mlflow(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Python on this machine, at the published port."""
        command = self.engine.inside(sys.executable, "-c", program, "http://127.0.0.1:5000", *arguments)
        env = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"}
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)

    def runs(self) -> str:
        finished = self.ask_mlflow(COUNT_RUNS)
        assert finished.returncode == 0
        return finished.stdout


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def wait_for(job: subprocess.Popen, condition: Callable[[], object]) -> None:
    wait_until(lambda: bool(condition()) or job.poll() is not None)
    assert job.poll() is None, job.communicate()[0]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    folder = tmp_path_factory.mktemp("containers")
    try:
        with engine_with_images(folder) as engine:
            composed = Composed(engine, folder)
            composed.up()
            yield composed
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes


@pytest.fixture(scope="module")
def quiet(composed: Composed) -> Path:
    """Storage of the demo that nothing breaks."""
    job = composed.submit("quiet")
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output
    return composed.shared / "quiet"


def test_image_has_no_leftovers_and_runs_as_no_root(composed):
    assert composed.execute("worker", "id", "-u").stdout.split() == ["1000"]
    for folder in ("/root/.cache", "/home/mmap/.cache/pip", "/var/lib/apt/lists/*", "/app/.git", "/app/.env"):
        assert composed.execute("worker", "sh", "-c", f"ls -d {folder}", check=False).returncode, folder
    for compiler in ("gcc", "cc", "g++", "make"):
        assert composed.execute("worker", "which", compiler, check=False).returncode, compiler
    assert composed.execute("worker", "touch", "/app/file", check=False).returncode


def test_the_demo_has_its_golden_numbers(composed, quiet):
    assert not differences(DEMO.stored(), read_numbers(quiet), DEMO.tolerance)
    assert composed.ask_mlflow(EVERY_STEP_ONCE, quiet).returncode == 0
    assert all(path.stat().st_uid == 1000 for path in quiet.rglob("*"))


def test_each_service_is_killed_in_a_run(composed, quiet):
    storage = composed.shared / "broken"
    job = composed.submit("broken")
    wait_for(job, lambda: checkpoints(storage, "global_prompt"))
    composed.kill("worker")
    wait_for(job, lambda: checkpoints(storage, "group_trainings"))
    composed.kill("postgres")
    composed.kill("mlflow")
    wait_for(job, lambda: list((storage / "group_trainings").glob("[!.]*")))
    composed.kill("head")
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode, output  # the head's jobs end with it, and are submitted again
    composed.up()
    job = composed.submit("broken")
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output
    assert numbers(storage) == numbers(quiet)
    assert composed.ask_mlflow(EVERY_STEP_ONCE, storage).returncode == 0


def test_backup_upgrade_and_down_keep_everything(composed, quiet, tmp_path):
    def artifacts() -> list[str]:
        return composed.execute("mlflow", "find", "/mlflow", "-type", "f", "-size", "+0").stdout.split()

    def saved(file: str, service: str, *command: str) -> None:
        with open(tmp_path / file, "wb") as stream:
            composed.execute(service, *command, stdout=stream, stderr=None)

    def restored(file: str, service: str, *command: str) -> None:
        with open(tmp_path / file, "rb") as stream:
            composed.execute(service, *command, stdin=stream)

    before = composed.runs(), artifacts()
    saved("mlflow.dump", "postgres", "pg_dump", "--username=mlflow", "--format=custom", "mlflow")
    saved("mlflow.tgz", "mlflow", "tar", "-C", "/mlflow", "-cz", ".")
    composed.execute("postgres", "psql", "--username=mlflow", "--command=DROP TABLE metrics, tags, runs CASCADE")
    composed.execute("mlflow", "sh", "-c", "rm -r /mlflow/*")
    composed.compose("stop", "mlflow")
    restore = ("pg_restore", "--username=mlflow", "--dbname=mlflow", "--clean", "--if-exists")
    restored("mlflow.dump", "postgres", *restore)
    composed.compose("start", "mlflow")
    composed.up()
    restored("mlflow.tgz", "mlflow", "tar", "-C", "/mlflow", "-xz")
    assert (composed.runs(), artifacts()) == before and before[1]

    composed.compose("run", "--rm", "-T", "mlflow", *"mlflow db upgrade postgresql+psycopg2:///mlflow".split())
    composed.compose("down")
    composed.up()
    assert (composed.runs(), artifacts()) == before
    job = composed.submit("quiet")
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0 and "cached" in output, output
