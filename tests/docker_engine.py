"""A Docker engine of a test's own, whose containers, networks, firewall rules and mounts end with one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pipelines import PATIENCE_S, REPOSITORY
from servers import BIN, free_ports

IMAGE = "mmap-clip:0.1.0"
PYTHON_IMAGE, POSTGRES_IMAGE = "python:3.11.15-slim-bookworm", "postgres:16.14-bookworm"
DEBIAN = "bookworm"
PROGRAMS = ("dockerd", "docker", "docker-init", "containerd", "runc", "iptables", "ip", "unshare", "nsenter")
# Stand-ins for the images of the files, with Debian's Python and PostgreSQL, for machines that reach no image registry.
PYTHON_STAND_IN = """\
FROM debian
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv python3-pip netbase tzdata \\
    && rm -rf /var/lib/apt/lists/* /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS={wheels}
"""
# As the image has them: the mode of the folder of sockets, the stop signal, what its entrypoint makes of the variables.
POSTGRES_STAND_IN = """\
FROM debian
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql \\
    && rm -rf /var/lib/apt/lists/* && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ \\
    && install --directory --owner postgres --group postgres /var/lib/postgresql/data \\
    && chmod 3777 /var/run/postgresql
COPY entrypoint.sh /
STOPSIGNAL SIGINT
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["/entrypoint.sh"]
"""
POSTGRES_ENTRYPOINT = """\
#!/bin/sh
set -eu
data=/var/lib/postgresql/data
if [ ! -s "$data/PG_VERSION" ]; then
    echo "$POSTGRES_PASSWORD" > /tmp/password
    initdb --pgdata="$data" --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-host=scram-sha-256 --encoding=UTF8
    rm /tmp/password
    pg_ctl --pgdata="$data" --options="-c listen_addresses=" --wait start
    createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    pg_ctl --pgdata="$data" --mode=fast --wait stop
    echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
fi
exec postgres -D "$data" -c listen_addresses='*'
"""


class Engine:
    """dockerd on paths below a folder, in namespaces of its own for processes and mounts, and, with `network`, for
    networks: then nothing outside is reached, and no port or firewall rule of this machine is touched."""

    def __init__(self, folder: Path, network: bool):
        self.folder, self._network = folder, network
        # Paths of sockets are short.
        self._run = Path(tempfile.mkdtemp(prefix="docker-"))
        self._cgroup = f"tests-{os.path.basename(self._run)}"
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{self._run}/docker.sock"}
        self._log = open(folder / "dockerd.log", "ab")
        dockerd = [
            *("dockerd", f"--host={self.env['DOCKER_HOST']}", f"--data-root={folder / 'data'}"),
            *(f"--exec-root={self._run / 'exec'}", f"--pidfile={self._run / 'pid'}", f"--cgroup-parent={self._cgroup}"),
            *("--bridge=none", *([] if network else ["--iptables=false"])),
        ]
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *(["--net"] if network else [])]
            + ["sh", "-c", f'{"ip link set lo up && " if network else ""}exec docker-init -- "$@"', "sh", *dockerd],
            env=self.env,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Engine:
        end = time.monotonic() + PATIENCE_S
        while self.docker("version", check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                lines = (self.folder / "dockerd.log").read_text().splitlines()
                pytest.skip(f"no Docker daemon can run here: {' '.join(lines[-1:])}")
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        """The first process of the namespaces takes all others with it, and its mounts."""
        for child in psutil.Process(self.process.pid).children() if self.process.poll() is None else []:
            child.terminate()  # so that dockerd completes what it writes
            for process in psutil.wait_procs([child], timeout=15)[1]:
                process.kill()
        self.process.kill()
        self.process.wait()
        self._log.close()
        for group in Path("/sys/fs/cgroup").glob(f"**/{self._cgroup}"):
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        shutil.rmtree(self._run, ignore_errors=True)

    def docker(self, *arguments: str | Path, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Output of standard output and errors is text, together, if not said otherwise."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        finished = subprocess.run(["docker", *arguments], env=self.env, timeout=PATIENCE_S, **options)
        assert not check or finished.returncode == 0, f"docker {arguments}:\n{finished.stdout}"
        return finished

    def inside(self, *command: str | Path) -> list[str | Path]:
        """Prefix a command, which then sees the engine's networks and published ports."""
        (child,) = psutil.Process(self.process.pid).children()
        return ["nsenter", f"--net=/proc/{child.pid}/ns/net", *command]

    def kill(self, container: str) -> None:
        """SIGKILL all processes of a container, as the kernel does when memory is short. (After `docker kill` a
        container is not restarted.)"""
        identity = self.docker("inspect", "--format={{.Id}}", container).stdout.strip()
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if identity in Path(f"/proc/{process.pid}/cgroup").read_text():
                    process.kill()


def requirements() -> list[str]:
    """All that the build installs."""
    content = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"]
    return [
        *content["build-system"]["requires"],
        *content["project"]["dependencies"],
        *extras["aggregation"],
        *extras["hugging-face"],
        *extras["server"],
    ]


@contextlib.contextmanager
def engine_with_images(folder: Path) -> Iterator[Engine]:
    """Engine without outside network that has the project's image and a stand-in for PostgreSQL's.

    The image's Dockerfile is built as it is, in a network that reaches Debian's packages, with wheels that pip
    downloads here, as it is configured on this machine.
    """
    if os.geteuid():
        pytest.skip("a Docker daemon of one's own needs root")
    missing = [name for name in (*PROGRAMS, "mmdebstrap") if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install docker.io iptables tini mmdebstrap")
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs Docker's plugin compose")
    context, wheels = folder / "stand-ins", folder / "wheels"
    context.mkdir()
    debian = ["mmdebstrap", "--quiet", "--variant=apt", "--include=ca-certificates", DEBIAN, context / "debian.tar"]
    bootstrap = subprocess.run(debian, capture_output=True, text=True)
    if bootstrap.returncode:
        pytest.skip(f"no packages of Debian here: {bootstrap.stderr}")
    download = [BIN / "python", "-m", "pip", "download", "--quiet", "--dest", wheels, "--python-version=3.11"]
    download += ["--only-binary=:all:", f"--constraint={REPOSITORY / 'constraints.txt'}", *requirements()]
    downloaded = subprocess.run(download, capture_output=True, text=True)
    if downloaded.returncode:
        pytest.skip(f"no packages of Python here: {downloaded.stderr}")
    (port,) = free_ports(1, start=8900)
    server = subprocess.Popen(
        [BIN / "python", "-m", "http.server", "--bind", "127.0.0.1", "--directory", wheels, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Engine(folder, network=False) as engine:
            engine.docker("import", context / "debian.tar", "debian")
            (context / "debian.tar").unlink()
            (context / "entrypoint.sh").write_text(POSTGRES_ENTRYPOINT)
            (context / "entrypoint.sh").chmod(0o755)
            for image, content in (
                (PYTHON_IMAGE, PYTHON_STAND_IN.format(wheels=f"http://127.0.0.1:{port}/")),
                (POSTGRES_IMAGE, POSTGRES_STAND_IN),
            ):
                build = ("build", "--network=host", "--file=-", f"--tag={image}", context)
                engine.docker(*build, input=content)
            build = ("build", "--network=host", "--file=cluster/Dockerfile", f"--tag={IMAGE}", ".")
            engine.docker(*build, cwd=REPOSITORY)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(wheels)
    with Engine(folder, network=True) as engine:
        yield engine
