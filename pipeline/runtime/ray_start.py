"""Checks of what Ray needs to start or to be joined, before it is imported, which takes seconds."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from pipeline.config import ClusterConfig
from pipeline.errors import UserError

LOCAL = "local"
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
"""Path below Ray's folder of temporary files of the socket with the longest name."""
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
MAX_FOLDER = MAX_SOCKET_PATH - len(LONGEST_SOCKET)
MIN_FREE_BYTES = 100 << 20
DEFAULT_FOLDER = "/tmp"
OTHER_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
SHARED_MEMORY = "/dev/shm"
CONNECT_TIMEOUT_S = 10
ENOUGH_FILES, ENOUGH_THREADS = 4096, 1000
"""Limits of a user above which they are no reason why Ray does not start."""


def ray_address(config: ClusterConfig) -> str:
    """Return the address of the Ray to use: `local`, `auto` or host:port."""
    if config.address in (None, "auto"):  # Ray itself prefers the variable to `auto`
        return os.environ.get("RAY_ADDRESS") or config.address or LOCAL
    return config.address


def check_ray(config: ClusterConfig) -> None:
    """Check that a Ray of this machine can be started, or that the cluster to join answers.

    Raises:
        UserError: It cannot, with the remedy.
    """
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        return
    address = ray_address(config)
    if address == LOCAL:
        temporary_folder()
        return
    if config.num_cpus:
        raise UserError(
            f"cluster.num_cpus={config.num_cpus} is for a local Ray, but the job joins the cluster at {address}, whose "
            "machines have the cores that `ray start --num-cpus` gives them: remove cluster.num_cpus "
            "(--cluster.num_cpus null)"
        )
    if address != "auto":
        _check_answers(address, address_source(config))


def address_source(config: ClusterConfig) -> str:
    """Return what names the address, for messages: the config field or the variable."""
    return f"cluster.address={config.address}" if config.address == ray_address(config) else "RAY_ADDRESS"


def _check_answers(address: str, source: str) -> None:
    named = source if "=" in source else f"{source}={address}"
    remedy = (
        "give HOST:PORT of the cluster's head (`ray start --head` prints it, usually port 6379), or `local` to start a "
        "Ray on this machine"
    )
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{named} is the address of a dashboard, to which jobs are submitted: `ray job submit --address {address} "
            f"-- python ...`. To join the cluster from one of its machines, {remedy}"
        )
    if "://" in address:
        raise UserError(f"{named} (Ray Client) is not supported: {remedy}")
    match = re.fullmatch(r"(\[[^\]]+\]|[^\s:]+):(\d{1,5})", address)
    if not match or not 0 < int(match[2]) < 1 << 16:
        raise UserError(f"{named} is not HOST:PORT: {remedy}")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{named}: no cluster answers there ({reason}). Start it, or {remedy}") from None


def temporary_folder() -> tuple[Path, str]:
    """Return the folder for Ray's sockets and logs, and, where it is not Ray's usual one, why: "" if it is.

    Raises:
        UserError: There is none.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    parent = Path(os.environ.get(variable, DEFAULT_FOLDER)).absolute()
    name = f"{variable}={parent}" if variable else str(parent)
    folders = [(name, parent / "ray"), *((other, Path(other) / f"ray-{os.getuid()}") for other in OTHER_FOLDERS)]
    errors: list[str] = []
    for name, folder in folders:
        if not (error := _folder_error(folder)):
            return folder, f"{errors[0]}: Ray's temporary files are in {folder}" if errors else ""
        errors.append(f"{name} {error}")
    raise UserError(
        f"Ray has no folder for its temporary files: {'; '.join(errors)}. Set RAY_TMPDIR to a folder whose path has "
        f"at most {MAX_FOLDER - len('/ray')} bytes, writable and with {MIN_FREE_BYTES >> 20} MiB free"
    )


def _folder_error(folder: Path) -> str:
    if len(os.fsencode(folder)) > MAX_FOLDER:
        return f"is too long for sockets (at most {MAX_FOLDER - len(folder.name) - 1} bytes)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        where = f" ({folder})" if folder.is_dir() else ""
        return f"is not usable{where}: {error.strerror}"
    return f"has {free >> 20} MiB free" if free < MIN_FREE_BYTES else ""


def private_token() -> str:
    """Give the Ray that this process starts a token of its own, unless the user has one or wants none: Ray would write
    one to the home folder. Return a warning if the user's can be read by others, else ""."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return ""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    try:
        mode = file.stat().st_mode & 0o777
    except OSError:
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return ""
    if not mode & 0o077:
        return ""
    return f"{file} can be read by others (mode {mode:o}), who can run code as you with this token: chmod 600 {file}"


def has_shared_memory() -> bool:
    """Return whether the machine has the shared memory that Ray's object store lies in by default."""
    return sys.platform != "linux" or os.access(SHARED_MEMORY, os.W_OK | os.X_OK)


def limits_advice() -> str:
    """Return remedies, each a sentence, for limits of the user below which Ray often does not start."""
    import resource

    import psutil

    advice = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # Ray raises the soft limit to the hard one
    if 0 <= files < ENOUGH_FILES:
        advice.append(f"At most {files} open files are allowed: raise the hard limit (ulimit -Hn {ENOUGH_FILES}).")
    threads = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if threads >= 0 and os.getuid():
        used = 0
        for process in psutil.process_iter(["uids", "num_threads"]):
            if process.info["uids"] and process.info["uids"].real == os.getuid():
                used += process.info["num_threads"] or 0
        if threads - used < ENOUGH_THREADS:
            advice.append(
                f"You have {used} of the {threads} processes and threads that you may have: raise the limit (ulimit -u "
                f"{used + ENOUGH_THREADS}), or end some."
            )
    cpus, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > 2 * cpus:
        advice.append(f"The machine is busy (load {load:.0f} on {cpus} CPU cores): rerun the same command later.")
    return " ".join(advice) or "Rerun the same command; if it fails again, Ray's logs say why."
