"""The service on Ray Serve:

    client ── Serve's proxy ── ingress ──┬── replica of all models (a GPU, or CPU cores)
                                         └── replica of all models

`running_service` deploys two Serve applications, so that on shutdown the ingress answers its requests before the
replicas stop. `build_application` builds one, for `serve run`, `serve deploy` and KubeRay's RayService.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.clip.load import build_meta_towers
from pipeline.config import Precision
from pipeline.config.schema import validate
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter
from pipeline.methods.registry import get_method
from pipeline.prediction.load import read_model
from pipeline.prediction.options import ModelOptions
from pipeline.runtime.cluster import WorkerResources, cluster_summary, num_slots
from pipeline.serving.http_api import ServedModel
from pipeline.serving.ingress import Ingress, IngressApp
from pipeline.serving.options import ApplicationOptions, ServingOptions, parse_models
from pipeline.serving.replica import ModelReplica
from pipeline.serving.shared_clip import NamedAdapters, check_one_clip
from pipeline.serving.tokens import read_token_digests

INGRESS_APP, MODELS_APP = "mmap-clip-ingress", "mmap-clip-models"
HEALTH_CHECK_INTERVAL_S = 5
POLL_INTERVAL_S = 5
MAX_LOAD_ATTEMPTS = 3
"""Attempts of a replica to load the models before the service fails."""
UNLIMITED_REQUESTS = 100_000
"""`max_ongoing_requests`: the ingress has its own limits, and requests must wait in the replica, which takes turns
between clients, rather than in Serve's routers, which do not."""
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


@dataclass(frozen=True)
class ServiceOptions:
    host: str
    port: int
    worker_resources: WorkerResources
    """Resources of a replica."""
    serving: ServingOptions
    token_digests: tuple[str, ...] = field(default=(), repr=False)


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
    # Once for all replicas; owned by the driver, for replicas that restart.
    adapters_ref: ray.ObjectRef[NamedAdapters] = ray.put(adapters)
    replica = _bind_replica(partial(_get_from_ray, [adapters_ref]), options)
    say("starting Ray Serve ...")
    serve.start(http_options={"host": options.host, "port": options.port}, logging_config=_QUIET)
    try:
        say("starting the replicas, which import PyTorch and load CLIP ...")
        ingress = _bind_ingress(DeploymentHandle(ModelReplica.__name__, MODELS_APP), adapters, options)
        _deploy({MODELS_APP: (replica, None), INGRESS_APP: (ingress, "/")})  # together, so that imports overlap
        yield
        with suppress(TimeoutError):  # raised after a minute
            serve.delete(INGRESS_APP)
        while INGRESS_APP in serve.status().applications:  # until all requests are answered or timed out
            time.sleep(0.1)
    finally:
        if not ends_with_ray:
            serve.shutdown()


def build_application(arguments: Mapping[str, Any]) -> serve.Application:
    """Build the service as one Serve application; its replicas read the models themselves.

    Args:
        arguments: fields of `ApplicationOptions`, as `args` in a Serve config. Files must exist on all machines.

    Raises:
        UserError: an invalid argument, a model that cannot be read, or models that cannot share a CLIP.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    serving = validate(ApplicationOptions, values)
    serving.check()
    digests = read_token_digests(serving.token_file) if serving.token_file else ()
    read_adapters = partial(_read_adapters, parse_models(serving.models), serving.pretrained, serving.precision)
    adapters = read_adapters()
    check_one_clip(adapters)
    worker_resources = WorkerResources(serving.cpus_per_worker, serving.gpus_per_worker)
    options = ServiceOptions("", 0, worker_resources, serving, digests)
    return _bind_ingress(_bind_replica(read_adapters, options), adapters, options)


def _bind_replica(get_adapters: Callable[[], NamedAdapters], options: ServiceOptions) -> serve.Application:
    serving, resources = options.serving, options.worker_resources
    deployment = serve.deployment(
        num_replicas=serving.replicas,
        ray_actor_options={"num_cpus": resources.cpus, "num_gpus": resources.gpus},
        max_constructor_retry_count=MAX_LOAD_ATTEMPTS,
        **_deployment_options(serving),
    )(ModelReplica)
    return deployment.bind(get_adapters, resources, serving.max_batch, serving.batch_wait_ms / 1000)


def _bind_ingress(replicas: Any, adapters: NamedAdapters, options: ServiceOptions) -> serve.Application:
    serving = options.serving
    models = {name: _describe_model(adapter, saved) for name, (adapter, saved) in adapters.items()}
    adapter, saved = next(iter(adapters.values()))
    preprocessing = build_meta_towers(adapter.config.clip.with_weights(saved.pretrained)).preprocessing
    deployment = serve.deployment(
        name=Ingress.__name__,
        num_replicas=serving.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        **_deployment_options(serving),
    )(serve.ingress(IngressApp())(Ingress))
    return deployment.bind(replicas, models, preprocessing, serving.limits(), options.token_digests)


def _deployment_options(serving: ServingOptions) -> dict[str, Any]:
    return {
        "max_ongoing_requests": UNLIMITED_REQUESTS,
        "health_check_period_s": HEALTH_CHECK_INTERVAL_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": serving.timeout_s + 5,
    }


def _get_from_ray(reference: list[ray.ObjectRef[NamedAdapters]]) -> NamedAdapters:
    """Return the object of a reference, which is in a list, since Ray would resolve a bare one."""
    return ray.get(reference[0])


def _read_adapters(sources: Mapping[str, str], pretrained: str | None, precision: Precision | None) -> NamedAdapters:
    return {name: read_model(source, pretrained, precision=precision)[:2] for name, source in sources.items()}


def watch_service(options: ServiceOptions, report: Callable[[str], None]) -> None:
    """Report changes of the number of replicas, until interrupted. Raises: UserError: the service was stopped."""
    previous = options.serving.replicas
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
            report(f"{num_running} of {options.serving.replicas} replicas are running")
            previous = num_running


def _check_cluster(options: ServiceOptions) -> None:
    if (max_replicas := num_slots(options.worker_resources)) < options.serving.replicas:
        raise UserError(
            f"--replicas {options.serving.replicas} of {options.worker_resources} each do not fit: the cluster has "
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
        multi_label=bool(adapter.logit_biases),
    )


def _deploy(applications: Mapping[str, tuple[serve.Application, str | None]]) -> None:
    """Deploy applications, each with its route, and wait until they run."""
    targets = [serve.RunTarget(built, name, route, _QUIET) for name, (built, route) in applications.items()]
    try:
        serve.run_many(targets)
    except RuntimeError:
        deployments = (item for name in applications for item in serve.status().applications[name].deployments.values())
        if match := re.search(r"UserError: (.+)", "\n".join(deployment.message for deployment in deployments)):
            raise UserError(f"a replica failed to start: {match[1]}") from None
        raise
