"""Ray cluster: connection, capacity, access of all machines to the same files, reports on stalls."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import interrupts
from pipeline.buckets import AnyPath
from pipeline.config import ClusterConfig
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.errors import UserError
from pipeline.runtime.ray_start import (
    LOCAL,
    SHARED_MEMORY,
    address_source,
    check_ray,
    has_shared_memory,
    limits_advice,
    private_token,
    ray_address,
    temporary_folder,
)
from pipeline.runtime.storage import Storage

IN_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
POLL_INTERVAL_S = 2
FIRST_MESSAGE_AFTER_S = 20
"""Time without any running work until the first message about it."""
NEXT_MESSAGE_AFTER_S = 60
OBJECT_STORE_BYTES = 512 << 20
"""Size of Ray's object store where there is no shared memory."""
MAX_REASON = 500
"""Characters of Ray's own errors that a message quotes."""

_is_private = False
"""Whether this process started its Ray, which has no other work."""


@dataclass(frozen=True)
class WorkerResources:
    """CPUs and GPUs of one training worker."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU and {self.cpus} CPU" if self.gpus else f"{self.cpus} CPU"

    def slots_on(self, resources: dict[str, float]) -> int:
        """Return how many such workers fit on a node with these resources; a fraction of a GPU is of one GPU."""
        num_slots = int(resources.get("CPU", 0) // self.cpus)
        if self.gpus:
            gpus = resources.get("GPU", 0)
            num_slots = min(
                num_slots, int(gpus // self.gpus) if self.gpus >= 1 else int(gpus) * int(1 / self.gpus + 1e-6)
            )
        return num_slots


@contextmanager
def ray_connection(
    config: ClusterConfig, say: Callable[[str], None], dashboard: bool = False
) -> Iterator[WorkerResources]:
    """Connect as `connect` does; disconnect at the end, unless this process was connected before."""
    was_initialized = ray.is_initialized()
    try:
        yield connect(config, say, dashboard)
    finally:
        if not was_initialized:
            ray.shutdown()


def connect(config: ClusterConfig, say: Callable[[str], None], dashboard: bool = False) -> WorkerResources:
    """Connect to Ray, start it, or use the connection that this process has (in a notebook, or for several runs in
    sequence).

    Args:
        dashboard: start the dashboard with a local Ray, whatever the config.

    Raises:
        UserError: The cluster cannot be reached, or is too small for a training.
    """
    if not ray.is_initialized():
        _join_or_start(config, dashboard, say)
    elif config.address not in (None, "auto", gcs_address := ray.get_runtime_context().gcs_address):
        raise UserError(
            f"this process is already connected to Ray at {gcs_address}, not to cluster.address={config.address}: "
            "remove cluster.address, or call ray.shutdown() first"
        )
    elif config.num_cpus not in (None, cpus := ray.cluster_resources().get("CPU", 0)):
        raise UserError(
            f"this process is already connected to a Ray of {cpus:g} CPU cores, not cluster.num_cpus="
            f"{config.num_cpus}: remove cluster.num_cpus, or call ray.shutdown() first"
        )
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    resources, workers = WorkerResources(config.cpus_per_worker, gpus), config.workers_per_training
    if workers > 1 and gpus % 1:
        raise UserError(
            f"cluster.workers_per_training={workers} needs whole GPUs: give --cluster.gpus_per_worker 1, not {gpus:g}"
        )
    min_workers = config.min_workers_per_training or workers
    if min_workers > workers:
        raise UserError(
            f"cluster.min_workers_per_training={min_workers} is more than workers_per_training={workers}: give "
            f"--cluster.min_workers_per_training {workers} or less"
        )
    if num_slots(resources) < min_workers and config.wait_for_nodes_s:
        _wait_for_nodes(resources, min_workers, config.wait_for_nodes_s, say)
    if num_slots(resources) < min_workers:
        per_worker = f" for each of {min_workers} workers (cluster.workers_per_training)" if workers > 1 else ""
        raise UserError(
            f"a training takes {resources}{per_worker}, but the cluster has {cluster_summary()}: lower "
            "cluster.gpus_per_worker, cpus_per_worker or workers_per_training, or start machines "
            "(cluster.wait_for_nodes_s waits for an autoscaler's)"
        )
    return resources


def local_ray_options(dashboard: bool, num_cpus: int) -> dict[str, Any]:
    """Return options of ray.init for a local Ray."""
    options: dict[str, Any] = {"include_dashboard": dashboard, "num_cpus": num_cpus}
    if " " in sys.executable:  # Ray Tune starts workers by a shell command in which the path is not quoted
        options["runtime_env"] = {"py_executable": shlex.quote(sys.executable)}
    return options


def _join_or_start(config: ClusterConfig, dashboard: bool, say: Callable[[str], None]) -> None:
    check_ray(config)
    global _is_private
    address = ray_address(config)
    _is_private = address == LOCAL
    options: dict[str, Any] = {}
    folder = None
    if _is_private:
        limit_threads()
        cpus, limit = usable_cpus()
        folder, *notes = temporary_folder()
        for note in (*notes, private_token()):
            if note:
                say(note)
        # Ray Train needs the dashboard to release placement groups.
        options = local_ray_options(dashboard or config.workers_per_training > 1, config.num_cpus or cpus)
        if not has_shared_memory():
            say(f"{SHARED_MEMORY} cannot be written: Ray's object store is in {folder}, which is slower")
            options |= {"_plasma_directory": str(folder), "object_store_memory": OBJECT_STORE_BYTES}
        is_limited = limit and not config.num_cpus
        say(f"starting Ray on {cpus} of {os.cpu_count()} CPU cores ({limit}) ..." if is_limited else "starting Ray ...")
    else:
        if not IN_SUBMITTED_JOB:  # Ray gives the working directory of a submitted job to all workers
            options["runtime_env"] = {"py_modules": [str(Path(__file__).parent.parent)]}  # the package
        say(f"connecting to Ray at {address} ...")
    try:
        if folder:
            start_local_ray(folder, options, say)
        else:
            with _signals_end_the_start():
                ray.init(address=address, logging_level=logging.ERROR, **options)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:MAX_REASON].rstrip(".")
        if _is_private:
            logs = f" ({folder}/session_latest/logs)"
            raise UserError(f"Ray did not start: {reason}{logs}. {limits_advice()}") from error
        stale = " `auto` found it in a file of a Ray that may have ended: `ray stop` removes it." * (address == "auto")
        raise UserError(
            f"cannot join the Ray cluster at {address} ({address_source(config)}): {reason}.{stale} The job must run "
            "on a machine of the cluster, with its versions of Ray and Python; from elsewhere, `ray job submit "
            "--address http://HEAD:8265 -- ...`. If the cluster requires a token, set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN"
        ) from error


def start_local_ray(folder: Path, options: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Start a Ray that listens on 127.0.0.1 only; again, up to twice, if it exceeds its own time limit.

    Args:
        folder: folder for its temporary files.
        options: other options of ray.init.
    """
    for is_last in (False, False, True):
        try:
            with _signals_end_the_start(folder), _loopback_only():
                ray.init(address=LOCAL, logging_level=logging.ERROR, _temp_dir=str(folder), **options)
            return
        except Exception as error:
            if is_last or type(error) is not Exception:  # the class of that time limit, which is fixed
                raise
            say(f"Ray did not start: {error} Starting it again ...")
            _kill_processes_of_ray(folder)


def _kill_processes_of_ray(folder: Path) -> None:
    """Kill what is left of a local Ray with this folder of temporary files, which did not start."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(str(folder / "session_") in argument for argument in child.cmdline()):
                child.kill()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a local Ray that the block starts listen on 127.0.0.1 only, as Ray does by default on macOS and Windows."""
    constants = ray._private.ray_constants
    previous = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = previous


@contextmanager
def _signals_end_the_start(folder: Path | None = None) -> Iterator[None]:
    """Let a signal end a job at once while Ray starts, whose processes end with this one.

    Ray's own handlers of SIGTERM raise SystemExit in the midst of its start, where it may be dropped, and print
    addresses of machine code; what it prints until it has started is held back for that time, in a file in `folder`
    (None: the system's for temporary files), and dropped if it does not start, which an error reports.
    """
    if not interrupts.are_handled():
        yield
        return
    set_handler = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    with tempfile.TemporaryFile(dir=folder) as output:
        stderr = os.dup(interrupts.STDERR)
        os.dup2(output.fileno(), interrupts.STDERR)
        try:
            with interrupts.ending_at_once("rerun the same command to resume", stderr):
                yield
        except Exception:
            output.truncate(0)
            raise
        finally:
            ray._private.utils.set_sigterm_handler = set_handler
            interrupts.handle_signals()  # in place of those of Ray's core
            os.dup2(stderr, interrupts.STDERR)
            os.close(stderr)
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace"))


def num_slots(resources: WorkerResources) -> int:
    """Return how many such workers fit on the cluster at once."""
    return sum(resources.slots_on(node["Resources"]) for node in _alive())


def cluster_summary() -> str:
    """Return the cluster's size as text: `2 GPUs and 8 CPUs on 2 machines`."""
    nodes = [node["Resources"] for node in _alive()]
    gpus, cpus = (sum(resources.get(name, 0) for resources in nodes) for name in ("GPU", "CPU"))
    machines = sum(1 for resources in nodes if resources.get("CPU") or resources.get("GPU"))
    return f"{gpus:g} GPUs and {cpus:g} CPUs on {machines} machine{'s' if machines != 1 else ''}"


def is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id for node in _alive())


def check_shared(storage: Storage, paths: Sequence[AnyPath]) -> None:
    """Check that every machine sees the storage, the data and the weights.

    Raises:
        UserError: A machine does not see some of them.
    """
    nodes = [node for node in _alive() if node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
    remote_check = ray.remote(_missing_paths)
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            problem = ray.get(remote_check.options(num_cpus=0, scheduling_strategy=strategy).remote(storage, paths))
        except RayError:
            if is_alive(node["NodeID"]):
                raise
            continue  # the node has left the cluster
        if problem:
            raise UserError(f"machine {node['NodeManagerAddress']}: {problem}")


def _missing_paths(storage: Storage, paths: Sequence[AnyPath]) -> str:
    try:
        storage.verify_access()
    except UserError as error:
        return str(error)
    try:
        missing = [str(path) for path in paths if not path.exists()]
    except UserError as error:  # of a bucket, which each machine reads with the credentials in its own environment
        return str(error)
    if missing:
        return (
            f"does not see {', '.join(missing)}: data.root and weights files must be on storage that all machines "
            "mount at the same path, or data.root in a bucket that all can read"
        )
    return ""


def _wait_for_nodes(resources: WorkerResources, workers: int, seconds: float, say: Callable[[str], None]) -> None:
    say(
        f"waiting up to {seconds:g} s for machines with room for {workers} x {resources}; there are {cluster_summary()}"
    )
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    request_resources(bundles=[bundle] * workers)
    end = time.monotonic() + seconds
    try:
        while num_slots(resources) < workers and time.monotonic() < end:
            time.sleep(POLL_INTERVAL_S)
    finally:
        request_resources(bundles=[])  # from now on the trainings themselves request resources


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


class StallReporter:
    """Reports what a stage waits for while nothing of this process's runs is running, at increasing intervals."""

    _last_active: ClassVar[float] = 0.0
    """Time at which work of any run was last seen running."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._last_poll = StallReporter._last_active = time.monotonic()
        self._next_message_s: float = FIRST_MESSAGE_AFTER_S

    def poll(self, waiting: Sequence[str], running_on: Sequence[str], resources: WorkerResources, workers: int) -> None:
        """Args:
        waiting: labels of the unfinished work items.
        running_on: ids of the nodes where some of them were last seen running.
        workers: number of workers of each work item.
        """
        time_now = time.monotonic()
        if time_now - self._last_poll < POLL_INTERVAL_S:
            return
        self._last_poll = time_now
        if any(map(is_alive, running_on)):
            StallReporter._last_active, self._next_message_s = time_now, FIRST_MESSAGE_AFTER_S
        elif time_now - StallReporter._last_active >= self._next_message_s:
            self._next_message_s = time_now - StallReporter._last_active + NEXT_MESSAGE_AFTER_S
            self._say(self._message(waiting, resources, workers))

    @staticmethod
    def _message(waiting: Sequence[str], resources: WorkerResources, workers: int) -> str:
        labels = f"{waiting[0]!r}" if len(waiting) == 1 else f"{waiting[0]!r} and {len(waiting) - 1} more"
        per_worker = f" for each of {workers} workers" if workers > 1 else ""
        reason = "waiting for machines to join; or press Ctrl-C and rerun the command with fewer resources"
        if num_slots(resources) >= workers:
            competing = "" if _is_private else "other work or by "
            reason = f"they are in use by {competing}starting workers"
        free = ray.available_resources()
        return (
            f"waiting: {labels} need{'s' if len(waiting) == 1 else ''} {resources}{per_worker}; the cluster has "
            f"{cluster_summary()}, {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs of them free: {reason}"
        )
