"""The Ray cluster: joining it, what it has room for, whether machines see the same files, what waits for what."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import ClusterConfig
from pipeline.errors import UserError
from pipeline.runtime.storage import Storage

IN_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
POLL_INTERVAL_S = 2
FIRST_MESSAGE_AFTER_S = 20
"""Of nothing running, until it is said what waits for what."""
NEXT_MESSAGE_AFTER_S = 60


@dataclass(frozen=True)
class WorkerResources:
    """Of one worker of a training."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU and {self.cpus} CPU" if self.gpus else f"{self.cpus} CPU"

    def slots_on(self, resources: dict[str, float]) -> int:
        """How many such workers a machine with these resources holds; a fraction is of one GPU."""
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
    """`connect`; leaves the cluster at the end, unless this process had joined it before."""
    was_initialized = ray.is_initialized()
    try:
        yield connect(config, say, dashboard)
    finally:
        if not was_initialized:
            ray.shutdown()


def connect(config: ClusterConfig, say: Callable[[str], None], dashboard: bool = False) -> WorkerResources:
    """Joins or starts Ray, or uses the Ray that this process has joined already (in a notebook, or for several runs
    one after another).

    Args:
        dashboard: whether a Ray that is started needs one, whatever the config.

    Raises:
        UserError: no cluster, or one that cannot hold a training.
    """
    if not ray.is_initialized():
        _join_or_start(config, dashboard)
    elif config.address not in (None, "auto", gcs_address := ray.get_runtime_context().gcs_address):
        raise UserError(
            f"this process has joined Ray at {gcs_address} already, not at cluster.address={config.address}: leave "
            "cluster.address out, or call ray.shutdown() first"
        )
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    resources, workers = WorkerResources(config.cpus_per_worker, gpus), config.workers_per_training
    if workers > 1 and gpus % 1:
        raise UserError(
            f"cluster.workers_per_training={workers} takes whole GPUs, not cluster.gpus_per_worker={gpus:g}"
        )
    fewest = config.min_workers_per_training or workers
    if fewest > workers:
        raise UserError(f"cluster.min_workers_per_training={fewest} is more than workers_per_training={workers}")
    if num_slots(resources) < fewest and config.wait_for_nodes_s:
        _wait_for_nodes(resources, fewest, config.wait_for_nodes_s, say)
    if num_slots(resources) < fewest:
        times = f" for each of {fewest} workers (cluster.workers_per_training)" if workers > 1 else ""
        raise UserError(
            f"a training takes {resources}{times}, but the cluster has {cluster_summary()}: lower "
            "cluster.gpus_per_worker, cpus_per_worker or workers_per_training, or start machines "
            "(cluster.wait_for_nodes_s waits for an autoscaler's)"
        )
    return resources


def local_ray_options(dashboard: bool) -> dict[str, Any]:
    """Of ray.init, for a Ray on this machine alone."""
    options: dict[str, Any] = {"include_dashboard": dashboard}
    if " " in sys.executable:  # Ray Tune's workers are started by a shell, to which Ray gives the path as it is
        options["runtime_env"] = {"py_executable": shlex.quote(sys.executable)}
    return options


def _join_or_start(config: ClusterConfig, dashboard: bool) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        # Ray Train asks the dashboard whether its placement groups are still needed.
        options = local_ray_options(dashboard or config.workers_per_training > 1)
    elif not IN_SUBMITTED_JOB:  # whose working directory Ray already gives to all workers
        options["runtime_env"] = {"py_modules": [str(Path(__file__).parent.parent)]}  # the package
    try:
        ray.init(address=address, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster can be joined at {address}: {error}; change cluster.address or RAY_ADDRESS, and where the "
            "cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None


def num_slots(resources: WorkerResources) -> int:
    """How many such workers the cluster holds at once."""
    return sum(resources.slots_on(node["Resources"]) for node in _alive())


def cluster_summary() -> str:
    """What the cluster has: `2 GPUs and 8 CPUs on 2 machines`."""
    nodes = [node["Resources"] for node in _alive()]
    gpus, cpus = (sum(resources.get(name, 0) for resources in nodes) for name in ("GPU", "CPU"))
    machines = sum(1 for resources in nodes if resources.get("CPU") or resources.get("GPU"))
    return f"{gpus:g} GPUs and {cpus:g} CPUs on {machines} machine{'s' if machines != 1 else ''}"


def is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id for node in _alive())


def check_shared(storage: Storage, paths: Sequence[Path]) -> None:
    """On several machines, storage, data and weights must be the same files everywhere.

    Raises:
        UserError: a machine that does not see some of them.
    """
    nodes = [node for node in _alive() if node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
    look = ray.remote(_missing_paths)
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            unseen = ray.get(look.options(num_cpus=0, scheduling_strategy=there).remote(storage, paths))
        except RayError:
            if is_alive(node["NodeID"]):
                raise
            continue  # it has left the cluster meanwhile
        if unseen:
            raise UserError(f"machine {node['NodeManagerAddress']}: {unseen}")


def _missing_paths(storage: Storage, paths: Sequence[Path]) -> str:
    try:
        storage.verify_access()
    except UserError as error:
        return str(error)
    if missing := [str(path) for path in paths if not path.exists()]:
        return (
            f"does not see {', '.join(missing)}: data.root and weights files must lie on storage that all machines "
            "share under the same path"
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
        request_resources(bundles=[])  # from here on the trainings themselves ask


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


class StallReporter:
    """Says what a stage waits for, when nothing of this process's runs is at work: not at once, and not too often."""

    _worked: ClassVar[float] = 0.0
    """When something of any run was last seen at work."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._looked = StallReporter._worked = time.monotonic()
        self._next_word: float = FIRST_MESSAGE_AFTER_S

    def look(self, waiting: Sequence[str], running_on: Sequence[str], resources: WorkerResources, workers: int) -> None:
        """Args:
        waiting: labels of the work that is not finished.
        running_on: ids of the machines where some of it was last seen running.
        workers: of each piece of work.
        """
        now = time.monotonic()
        if now - self._looked < POLL_INTERVAL_S:
            return
        self._looked = now
        if any(map(is_alive, running_on)):
            StallReporter._worked, self._next_word = now, FIRST_MESSAGE_AFTER_S
        elif now - StallReporter._worked >= self._next_word:
            self._next_word = now - StallReporter._worked + NEXT_MESSAGE_AFTER_S
            self._say(self._word(waiting, resources, workers))

    @staticmethod
    def _word(waiting: Sequence[str], resources: WorkerResources, workers: int) -> str:
        many = f"{waiting[0]!r}" if len(waiting) == 1 else f"{waiting[0]!r} and {len(waiting) - 1} more"
        times = f" for each of {workers} workers" if workers > 1 else ""
        why = (
            "other work holds them, or workers that start"
            if num_slots(resources) >= workers
            else "that is too little: they wait for machines to join; Ctrl-C and the same command with less go on too"
        )
        free = ray.available_resources()
        return (
            f"waiting: {many} wait{'s' if len(waiting) == 1 else ''} for {resources}{times}; the cluster has "
            f"{cluster_summary()}, of which {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs are free: {why}"
        )
