"""Starting a local Ray, or joining a cluster: what goes wrong is avoided, or reported before any work with a remedy."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray.exceptions import AuthenticationError

from pipeline.config import ClusterConfig, Config
from pipeline.errors import UserError
from pipeline.runtime import cluster, ray_start
from pipeline.runtime.ray_start import check_ray, private_token, temporary_folder
from pipeline.stages.paths import check_paths

VARIABLES = ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def unconnected(monkeypatch):
    """A process without Ray, and an environment that says nothing about it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # restores it at the end, whatever sets it in between
        monkeypatch.delenv(variable)


@pytest.fixture
def short_folder():
    """A folder whose path is short enough for sockets, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def listening():
    """Address of a socket that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def start(config: ClusterConfig, monkeypatch, error: Any = None) -> tuple[dict[str, Any], list[str]]:
    """Return the options with which Ray would be started, and what is told."""
    messages: list[str] = []
    with monkeypatch.context() as patches:
        ray_init = Mock(side_effect=error)
        patches.setattr(ray, "init", ray_init)
        cluster._join_or_start(config, False, messages.append)
    return ray_init.call_args.kwargs, messages


@pytest.mark.parametrize(("num_cpus", "started"), [(None, 3), (7, 7)])
def test_a_local_ray_has_the_cores_of_the_job(num_cpus, started, unconnected, monkeypatch):
    monkeypatch.setattr(cluster, "usable_cpus", lambda: (3, "CPU affinity"))
    options, messages = start(ClusterConfig(num_cpus=num_cpus), monkeypatch)
    assert options["address"] == "local" and options["num_cpus"] == started
    assert ("3 of" in messages[-1] and "CPU affinity" in messages[-1]) == (num_cpus is None)


def test_the_cores_of_a_cluster_are_its_own(unconnected, listening, monkeypatch):
    for address, environment in ((listening, "local"), ("auto", listening), (None, listening)):
        monkeypatch.setenv("RAY_ADDRESS", environment)
        with pytest.raises(UserError, match=f"cluster.num_cpus=2 .*{listening}.*remove cluster.num_cpus"):
            check_ray(ClusterConfig(num_cpus=2, address=address))
        options, _ = start(ClusterConfig(address=address), monkeypatch)
        assert options["address"] == listening and not {"num_cpus", "_temp_dir"} & options.keys()


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://127.0.0.1:8265", "dashboard.*ray job submit --address http://127.0.0.1:8265"),
        ("https://ray.example", "dashboard"),
        ("ray://127.0.0.1:10001", "not supported"),
        ("head", "not HOST:PORT"),
        ("head:port", "not HOST:PORT"),
        (":6379", "not HOST:PORT"),
        ("127.0.0.1:99999", "not HOST:PORT"),
        ("127.0.0.1:1", "no cluster answers"),
        ("[::1]:1", "no cluster answers"),
        ("no-such-host.invalid:6379", "no cluster answers"),
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_addresses_that_cannot_be_joined(address, problem, by_variable, unconnected, monkeypatch):
    name = "RAY_ADDRESS" if by_variable else "cluster.address"
    if by_variable:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"(?s){name}=.*{problem}.*HOST:PORT of the cluster's head .*`local`"):
        check_paths(Config(cluster={} if by_variable else {"address": address}))


def test_a_connected_process_needs_no_other_ray(unconnected, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    check_ray(ClusterConfig())


@pytest.mark.parametrize(
    ("variable", "fault"),
    [
        *itertools.product(["TMPDIR", "RAY_TMPDIR"], ["too long", "not usable", "MiB free"]),
        (None, "not usable"),
        (None, "MiB free"),
    ],
)
def test_another_folder_takes_the_place_of_an_unusable_one(
    variable, fault, unconnected, tmp_path, short_folder, monkeypatch
):
    usable, unusable = short_folder / "u", short_folder / "f"
    usable.mkdir()
    if fault == "too long":
        unusable = tmp_path / ("long" * 10)
    elif fault == "not usable":
        unusable.write_text("not a folder")
    else:
        disk_usage = shutil.disk_usage
        full = SimpleNamespace(free=1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full if path.parent == unusable else disk_usage(path))
    if variable:
        monkeypatch.setenv(variable, str(unusable))
    else:
        monkeypatch.setattr(ray_start, "DEFAULT_FOLDER", str(unusable))
    monkeypatch.setattr(ray_start, "OTHER_FOLDERS", (str(unusable), str(usable)))
    folder, note = temporary_folder()
    assert folder.parent == usable and folder.is_dir() and f"{unusable} " in note and str(folder) in note
    assert len(f"{folder}{ray_start.LONGEST_SOCKET}") <= 107
    options, messages = start(ClusterConfig(), monkeypatch)
    assert options["_temp_dir"] == str(folder) and messages[0] == note
    monkeypatch.setattr(ray_start, "OTHER_FOLDERS", (str(unusable),))
    with pytest.raises(UserError, match=f"{fault}.* Set RAY_TMPDIR to a folder"):
        check_paths(Config())


def test_the_usual_folder_is_taken_silently(unconnected, short_folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(short_folder))
    assert temporary_folder() == (short_folder / "ray", "")
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder / "a"))
    assert temporary_folder() == (short_folder / "a" / "ray", "")


def test_nothing_is_written_to_the_home_folder(unconnected, tmp_path, monkeypatch):
    """Which may be read-only; and Ray writes its token readable by all."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not private_token() and "RAY_AUTH_TOKEN" not in os.environ  # RAY_AUTH_MODE=disabled of these tests
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert not private_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and not list(tmp_path.iterdir())
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert not private_token() and os.environ["RAY_AUTH_TOKEN"] == "mine"


@pytest.mark.parametrize("variable", [None, "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_others_can_read_is_named(variable, unconnected, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ("token" if variable else ".ray/auth_token")
    file.parent.mkdir(exist_ok=True)
    file.write_text("secret")
    if variable:
        monkeypatch.setenv(variable, str(file))
    file.chmod(0o644)
    assert f"chmod 600 {file}" in private_token()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    file.chmod(0o600)
    assert not private_token() and "RAY_AUTH_TOKEN" not in os.environ


def test_a_machine_without_shared_memory(unconnected, monkeypatch):
    monkeypatch.setattr(ray_start, "SHARED_MEMORY", "/nowhere")
    options, messages = start(ClusterConfig(), monkeypatch)
    assert options["_plasma_directory"] == options["_temp_dir"] and options["object_store_memory"]
    assert any("object store is in" in message for message in messages)


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup."),
        RuntimeError("Failed to start GCS.\n Last lines"),
        OSError(11, "Resource temporarily unavailable"),
        ValueError("Attempting to cap object store memory usage"),
        AuthenticationError("no token"),
        ConnectionError("refused"),
        AssertionError(),
    ],
)
def test_whatever_ray_raises_is_reported_without_a_traceback(error, unconnected, listening, monkeypatch, capfd):
    with pytest.raises(UserError, match=f"Ray did not start: {type(error).__name__}.*logs") as raised:
        start(ClusterConfig(), monkeypatch, error)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=f"cannot join .*{listening}.*{type(error).__name__}.*ray job submit .*token"):
        start(ClusterConfig(address=listening), monkeypatch, error)
    assert capfd.readouterr().err == ""


def test_a_slow_start_is_tried_again(unconnected, short_folder, monkeypatch):
    """A loaded machine, or packages on a slow file system: the next time they are in memory."""
    monkeypatch.setenv("TMPDIR", str(short_folder))
    leftover = subprocess.Popen([sys.executable, "-c", "input()", f"{short_folder}/ray/session_1/raylet"], stdin=-1)
    unrelated = subprocess.Popen([sys.executable, "-c", "input()", "of the user"], stdin=-1)
    slow = Exception("The current node timed out during startup.")
    with leftover, unrelated:
        _, messages = start(ClusterConfig(), monkeypatch, [slow, slow, None])
        assert "again" in messages[-1]
        assert leftover.wait(60) == -signal.SIGKILL and unrelated.poll() is None
        unrelated.communicate(b"\n")
    with pytest.raises(UserError, match="Ray did not start: Exception: .*timed out"):
        start(ClusterConfig(), monkeypatch, [slow, slow, slow])


def test_limits_that_are_a_reason_are_named(monkeypatch):
    import resource

    limits = {resource.RLIMIT_NOFILE: (64, 256), resource.RLIMIT_NPROC: (20, 30)}
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(os, "getloadavg", lambda: (1e4, 0, 0))
    advice = ray_start.limits_advice()
    assert "256 open files" in advice and "0 of the 20 processes" in advice and "rerun" in advice
    limits |= {resource.RLIMIT_NOFILE: (64, -1), resource.RLIMIT_NPROC: (-1, -1)}
    monkeypatch.setattr(os, "getloadavg", lambda: (0, 0, 0))
    assert ray_start.limits_advice().startswith("Rerun the same command")
