#!/usr/bin/env python
"""Serve trained models over HTTP with Ray Serve: one or several models on one CLIP. Ctrl-C or SIGTERM stops it.

    mmap-clip serve --models digits=mmap-runs/runs/<run>
    mmap-clip serve --models a=mmap-runs/runs/<run> b=models:/digits@champion --replicas 2 --port 8000

    curl localhost:8000/models
    curl 'localhost:8000/models/digits/predict?task=ink_left' -H 'Content-Type: image/png' --data-binary @photo.png

The models must have been trained on the same CLIP, whose weights each replica loads once. docs/serving.md describes all
endpoints, responses and limits. Without --token_file, anyone who can reach the address can use it.
"""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING

from pipeline.command_line import Field, check_adapter_exists, importing, print_status, report_user_errors
from pipeline.config import JobArguments, JobParser, parse_config
from pipeline.errors import UserError
from pipeline.interrupts import forget_signals
from pipeline.runtime.ray_start import LOCAL, check_ray, ray_address
from pipeline.serving.options import ServingOptions, parse_models
from pipeline.serving.tokens import read_token_digests

if TYPE_CHECKING:
    from pipeline.serving.shared_clip import NamedAdapters


class Options(ServingOptions):
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all interfaces.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    trusted_proxies: tuple[str, ...] = Field(
        (),
        description="Addresses or networks of reverse proxies, whose header X-Forwarded-For names the client; on a "
        "cluster, FORWARDED_ALLOW_IPS of its machines.",
    )


FIELD_HELP = {
    "clip.pretrained": "CLIP weights: an open_clip tag, a file, a folder or hf-hub:ORG/NAME; null: as in training.",
    "cluster.address": "Ray cluster to join; null: RAY_ADDRESS, else a local Ray is started.",
    "cluster.num_cpus": "CPU cores of a local Ray; null: those that the job may use.",
    "cluster.gpus_per_worker": "GPUs per replica, may be fractional; null: 1 if available, else 0.",
    "cluster.cpus_per_worker": "CPU cores per replica; without GPUs also its threads; null: 1.",
}


def main() -> None:
    with report_user_errors("rerun the same command to start the service again"):
        serve(JobParser(__doc__, Options, FIELD_HELP).parse())


def serve(arguments: JobArguments[Options]) -> None:
    job, cluster = arguments.options, parse_config(arguments.nested_fields()).cluster
    sources = parse_models(job.models)

    for source in sources.values():
        check_adapter_exists(source)
    job.check()
    check_trusted_proxies(job.trusted_proxies)
    token_digests = read_token_digests(job.token_file) if job.token_file else ()
    check_ray(cluster)
    is_local = ray_address(cluster) == LOCAL
    if is_local:  # inherited by all processes of Serve; 1.5 times the requests per second
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
        os.environ["FORWARDED_ALLOW_IPS"] = ",".join(job.trusted_proxies)  # of uvicorn, Serve's HTTP server
    elif job.trusted_proxies:
        raise UserError(
            "--trusted_proxies has no effect on a cluster: set FORWARDED_ALLOW_IPS on its machines before Ray starts"
        )
    with importing("PyTorch and Ray Serve"):
        import ray

        from pipeline.clip.load import fetch_weights
        from pipeline.prediction.load import read_model
        from pipeline.runtime.cluster import WorkerResources, connect
        from pipeline.serving.service import ServiceOptions, port_error, running_service, watch_service
        from pipeline.serving.shared_clip import check_one_clip

    pretrained = arguments.fields.get("clip.pretrained")
    adapters: NamedAdapters = {
        name: read_model(source, pretrained, precision=job.precision)[:2] for name, source in sources.items()
    }
    check_one_clip(adapters)
    adapter, saved = next(iter(adapters.values()))
    fetch_weights(adapter.config.clip.with_weights(saved.pretrained), print_status)
    if is_local and (error := port_error(job.host, job.port)):
        raise UserError(error)
    connect(cluster.model_copy(update={"cpus_per_worker": 1, "gpus_per_worker": 0}), print_status)
    try:
        gpus = cluster.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        options = ServiceOptions(
            host=job.host,
            port=job.port,
            worker_resources=WorkerResources(cluster.cpus_per_worker, gpus),
            serving=job,
            token_digests=token_digests,
        )
        if not token_digests and not is_loopback(job.host):
            print_status(
                f"warning: anyone who can reach {job.host}:{job.port} can use the service; set --token_file, or put a "
                "proxy with access control in front of it"
            )
        with running_service(adapters, options, print_status, ends_with_ray=is_local):
            served = "; ".join(f"{name}: {', '.join(adapter.class_names)}" for name, (adapter, _) in adapters.items())
            print_status(f"ready: http://{job.host}:{job.port}, {job.replicas} x {options.worker_resources}; {served}")
            try:
                watch_service(options, print_status)
            except KeyboardInterrupt:
                forget_signals()
                print_status("stopping: pending requests are still answered; interrupt again to stop immediately")
    finally:
        ray.shutdown()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_trusted_proxies(proxies: tuple[str, ...]) -> None:
    """Raises: UserError: one is no address and no network."""
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise UserError(
                f"--trusted_proxies {proxy}: expected an address or a network, such as 10.0.0.5 or 10.0.0.0/24"
            ) from None


if __name__ == "__main__":
    main()
