"""The service on Ray Serve:

    client ── Serve's proxy ── ingress ──┬── replica of all models (a GPU, or CPU cores)
                                         └── replica of all models

Two applications of Serve, so that at the end the ingress answers what it has before the replicas go.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.clip.load import build_meta_towers
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.methods.registry import get_method
from pipeline.prediction.options import ModelOptions
from pipeline.runtime.cluster import WorkerResources, cluster_summary, num_slots
from pipeline.serving.http_api import Limits, ServedModel
from pipeline.serving.ingress import Ingress
from pipeline.serving.replica import ModelReplica
from pipeline.serving.shared_clip import Trained

INGRESS_APP, MODELS_APP = "mmap-clip-ingress", "mmap-clip-models"
HEALTH_CHECK_EVERY_S = 5
POLL_INTERVAL_S = 5
LOADING_TRIES = 3
"""Of a replica that cannot load the models, until the service is given up."""
MIN_IN_REPLICA = 32
"""Requests that a replica holds at once at least: with fewer, Serve asks in vain more often than it sends."""
UNLIMITED = 100_000
"""Requests that Serve hands to the ingress at once. One that waited in Serve's proxy would be read there without a
limit, so none must: the ingress has the limits."""
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


@dataclass(frozen=True)
class ServiceOptions:
    host: str
    port: int
    replicas: int
    ingress_replicas: int
    worker_resources: WorkerResources
    """Of a replica."""
    max_batch: int
    batch_wait_s: float
    limits: Limits


@contextmanager
def running_service(trained: Trained, options: ServiceOptions, ends_with_ray: bool) -> Iterator[None]:
    """The service of models that `check_one_clip` has seen, for as long as the block; Ray must be connected. At the
    end it takes no more requests and answers those that it has.

    Args:
        ends_with_ray: the Ray was started for it, and ends next; else Serve's processes are ended here.

    Raises:
        UserError: too small a cluster, Serve is at work on it already, an address that cannot be had, a replica that
            cannot load the models.
    """
    _check_cluster(options)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells each step
    in_store = ray.put(dict(trained))  # once for all replicas; the driver keeps it, for those that are started again
    models = {name: _told(*of_model) for name, of_model in trained.items()}
    prompts, _ = next(iter(trained.values()))
    image_size = build_meta_towers(prompts.config.clip).image_size
    for_both: dict[str, Any] = {
        "health_check_period_s": HEALTH_CHECK_EVERY_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": options.limits.timeout_s + 5,
    }
    replica = serve.deployment(
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.worker_resources.cpus, "num_gpus": options.worker_resources.gpus},
        max_ongoing_requests=max(2 * options.max_batch, MIN_IN_REPLICA),  # one batch runs, the next one fills
        max_constructor_retry_count=LOADING_TRIES,
        **for_both,
    )(ModelReplica)
    ingress = serve.deployment(
        num_replicas=options.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNLIMITED,
        **for_both,
    )(Ingress)
    serve.start(http_options={"host": options.host, "port": options.port}, logging_config=_QUIET)
    try:
        bound = replica.bind([in_store], options.worker_resources, options.max_batch, options.batch_wait_s)
        replicas = _run(bound, MODELS_APP, None)
        _run(ingress.bind(replicas, models, image_size, options.limits), INGRESS_APP, "/")
        yield
        with suppress(TimeoutError):  # after a minute
            serve.delete(INGRESS_APP)
        while INGRESS_APP in serve.status().applications:  # till its last request has its answer, or its time is over
            time.sleep(0.1)
    finally:
        if not ends_with_ray:
            serve.shutdown()


def watch_service(options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Tells when replicas go and come, until interrupted. Raises: UserError: someone else ended the service."""
    before = options.replicas
    while True:
        time.sleep(POLL_INTERVAL_S)
        try:
            applications = serve.status().applications
            states = applications[MODELS_APP].deployments[ModelReplica.__name__].replica_states
        except (RayError, RayServeException, KeyError) as error:
            raise UserError(f"the service was ended from elsewhere ({type(error).__name__}): start it again") from None
        if (now := sum(count for state, count in states.items() if state == "RUNNING")) != before:
            say(f"{now} of {options.replicas} replicas hold the models")
            before = now


def _check_cluster(options: ServiceOptions) -> None:
    if (found := num_slots(options.worker_resources)) < options.replicas:
        raise UserError(
            f"--replicas {options.replicas} of {options.worker_resources} each: the cluster has {cluster_summary()}, "
            f"room for {found}; lower --replicas, --cluster.gpus_per_worker or cpus_per_worker, or start machines"
        )
    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        there = ", ".join(serve.status().applications) or "none"
        raise UserError(
            f"Ray Serve is at work on this cluster already (applications: {there}), and has one address for all: end "
            "it there with `serve shutdown`, or use another cluster"
        )
    probe = ray.remote(port_error)
    for node in ray.nodes():
        if node["Alive"]:
            on_node = probe.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            )
            if fault := ray.get(on_node.remote(options.host, options.port)):
                raise UserError(f"machine {node['NodeManagerAddress']}: {fault}")


def port_error(host: str, port: int) -> str:
    """Why this machine cannot listen there; empty: it can."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as error:
        return f"cannot listen on --host {host} --port {port}: {error.strerror or error}; give others, or end what does"


def _told(prompts: TrainedAdapter, options: ModelOptions) -> ServedModel:
    kind = get_method(prompts.method)
    return ServedModel(
        method=kind.title,
        clip=prompts.config.clip.model,
        weights=prompts.weights,
        labels=prompts.labels,
        threshold=options.threshold,
        temperatures=options.temperatures,
    )


def _run(application: serve.Application, name: str, path: str | None) -> DeploymentHandle[Any]:
    try:
        return serve.run(application, name=name, route_prefix=path, logging_config=_QUIET)
    except RuntimeError:
        deployments = serve.status().applications[name].deployments.values()
        if told := re.search(r"UserError: (.+)", "\n".join(of_one.message for of_one in deployments)):
            raise UserError(f"a replica cannot be started: {told[1]}") from None
        raise
