"""The service on Ray Serve:

    client ── Serve's proxy ── ingress ──┬── replica of all models (a GPU, or CPU cores)
                                         └── replica of all models

There are two Serve applications, so that on shutdown the ingress answers its requests before the replicas stop.
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
from pipeline.serving.shared_clip import NamedAdapters

INGRESS_APP, MODELS_APP = "mmap-clip-ingress", "mmap-clip-models"
HEALTH_CHECK_INTERVAL_S = 5
POLL_INTERVAL_S = 5
MAX_LOAD_ATTEMPTS = 3
"""Attempts of a replica to load the models before the service fails."""
MIN_ONGOING_REQUESTS = 32
"""Minimum of a replica's `max_ongoing_requests`: with less, most of Serve's routing attempts are rejected."""
UNLIMITED_REQUESTS = 100_000
"""`max_ongoing_requests` of the ingress, which has its own limits; Serve's proxy reads waiting requests without any."""
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


@dataclass(frozen=True)
class ServiceOptions:
    host: str
    port: int
    replicas: int
    ingress_replicas: int
    worker_resources: WorkerResources
    """Resources of a replica."""
    max_batch: int
    batch_wait_s: float
    limits: Limits


@contextmanager
def running_service(
    adapters: NamedAdapters, options: ServiceOptions, say: Callable[[str], None], ends_with_ray: bool
) -> Iterator[None]:
    """Serve models that passed `check_one_clip` while the block runs; Ray must be connected. At the end, new requests
    are rejected and pending ones are answered.

    Args:
        say: is told what the start waits for.
        ends_with_ray: Ray is shut down next; False: shut down Serve's processes here.

    Raises:
        UserError: the cluster is too small or already runs Serve, the address is not available, or a replica cannot
            load the models.
    """
    _check_cluster(options)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it logs each step
    adapters_ref = ray.put(dict(adapters))  # once for all replicas; owned by the driver, for replicas that restart
    models = {name: _describe_model(adapter, saved) for name, (adapter, saved) in adapters.items()}
    adapter, saved = next(iter(adapters.values()))
    preprocessing = build_meta_towers(adapter.config.clip.with_weights(saved.pretrained)).preprocessing
    deployment_options: dict[str, Any] = {
        "health_check_period_s": HEALTH_CHECK_INTERVAL_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": options.limits.timeout_s + 5,
    }
    replica = serve.deployment(
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.worker_resources.cpus, "num_gpus": options.worker_resources.gpus},
        max_ongoing_requests=max(
            2 * options.max_batch, MIN_ONGOING_REQUESTS
        ),  # one batch runs while the next one fills
        max_constructor_retry_count=MAX_LOAD_ATTEMPTS,
        **deployment_options,
    )(ModelReplica)
    ingress = serve.deployment(
        num_replicas=options.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNLIMITED_REQUESTS,
        **deployment_options,
    )(Ingress)
    say("starting Ray Serve ...")
    serve.start(http_options={"host": options.host, "port": options.port}, logging_config=_QUIET)
    try:
        say("starting the replicas, which import PyTorch and load CLIP ...")
        application = replica.bind([adapters_ref], options.worker_resources, options.max_batch, options.batch_wait_s)
        replicas = _deploy(application, MODELS_APP, None)
        _deploy(ingress.bind(replicas, models, preprocessing, options.limits), INGRESS_APP, "/")
        yield
        with suppress(TimeoutError):  # raised after a minute
            serve.delete(INGRESS_APP)
        while INGRESS_APP in serve.status().applications:  # until all requests are answered or timed out
            time.sleep(0.1)
    finally:
        if not ends_with_ray:
            serve.shutdown()


def watch_service(options: ServiceOptions, report: Callable[[str], None]) -> None:
    """Report changes of the number of replicas, until interrupted. Raises: UserError: the service was stopped."""
    previous = options.replicas
    while True:
        time.sleep(POLL_INTERVAL_S)
        try:
            applications = serve.status().applications
            states = applications[MODELS_APP].deployments[ModelReplica.__name__].replica_states
        except (RayError, RayServeException, KeyError) as error:
            raise UserError(
                f"the service was stopped by another process ({type(error).__name__}); restart it"
            ) from None
        if (num_running := sum(count for state, count in states.items() if state == "RUNNING")) != previous:
            report(f"{num_running} of {options.replicas} replicas are running")
            previous = num_running


def _check_cluster(options: ServiceOptions) -> None:
    if (max_replicas := num_slots(options.worker_resources)) < options.replicas:
        raise UserError(
            f"--replicas {options.replicas} of {options.worker_resources} each do not fit: the cluster has "
            f"{cluster_summary()}, enough for {max_replicas}; lower --replicas, --cluster.gpus_per_worker or "
            "cpus_per_worker, or add machines"
        )
    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        applications = ", ".join(serve.status().applications) or "none"
        raise UserError(
            f"Ray Serve already runs on this cluster (applications: {applications}) and has only one address; stop it "
            "with `serve shutdown`, or use another cluster"
        )
    probe = ray.remote(port_error)
    for node in ray.nodes():
        if node["Alive"]:
            node_probe = probe.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            )
            if error := ray.get(node_probe.remote(options.host, options.port)):
                raise UserError(f"machine {node['NodeManagerAddress']}: {error}")


def port_error(host: str, port: int) -> str:
    """Return why this machine cannot listen on the address, or "" if it can."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as error:
        reason = error.strerror or error
        return f"cannot listen on --host {host} --port {port}: {reason}; use another address, or stop what uses it"


def _describe_model(adapter: TrainedAdapter, options: ModelOptions) -> ServedModel:
    return ServedModel(
        method=get_method(adapter.method).title,
        clip=adapter.config.clip.model,
        weights=adapter.weights,
        labels=adapter.labels,
        threshold=options.threshold,
        temperatures=options.temperatures,
    )


def _deploy(application: serve.Application, name: str, path: str | None) -> DeploymentHandle[Any]:
    try:
        return serve.run(application, name=name, route_prefix=path, logging_config=_QUIET)
    except RuntimeError:
        deployments = serve.status().applications[name].deployments.values()
        if match := re.search(r"UserError: (.+)", "\n".join(deployment.message for deployment in deployments)):
            raise UserError(f"a replica failed to start: {match[1]}") from None
        raise
