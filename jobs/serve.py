#!/usr/bin/env python
"""Serve trained models over HTTP with Ray Serve: one or several models on one CLIP. Ctrl-C or SIGTERM stops it.

    mmap-clip serve --models digits=mmap-runs/runs/<run>
    mmap-clip serve --models a=mmap-runs/runs/<run> b=models:/digits@champion --replicas 2 --port 8000

    curl localhost:8000/models
    curl 'localhost:8000/models/digits/predict?task=ink' -H 'Content-Type: image/png' --data-binary @photo.png

The models must have been trained on the same CLIP, whose weights each replica loads once. docs/serving.md describes all
endpoints, responses and limits. There is no authentication: anyone who can reach the address can use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.command_line import Field, check_adapter_exists, importing, print_status, report_user_errors
from pipeline.config import JobArguments, JobOptions, JobParser, parse_config
from pipeline.cpus import usable_cpus
from pipeline.errors import UserError
from pipeline.interrupts import forget_signals

if TYPE_CHECKING:
    from pipeline.serving.shared_clip import NamedAdapters

MIB = 2**20


class Options(JobOptions):
    undivided: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[str, ...] = Field(
        description="NAME=SOURCE of each model: its name in the URLs, and a .safetensors file, a run directory (either "
        "local or s3://), or an MLflow URI (models:/..., runs:/...)."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all interfaces.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    max_request_mib: float = Field(10, gt=0, lt=4096, description="Maximum size of a request body in MiB.")
    max_images: int = Field(64, ge=1, description="Maximum number of images per request.")
    max_waiting: int = Field(
        256, ge=1, description="Maximum in-flight requests per ingress; more get 503 with Retry-After."
    )
    timeout_s: float = Field(60, gt=0, description="Request timeout in seconds.")
    replicas: int = Field(1, ge=1, description="Number of replicas, each with all models.")
    max_batch: int = Field(64, ge=1, description="Maximum batch size of a replica.")
    batch_wait_ms: float = Field(5, ge=0, description="Batch wait timeout in milliseconds.")
    ingress_replicas: int = Field(1, ge=1, description="Number of ingresses, which decode the images.")


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
    is_local = (cluster.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    if is_local:  # inherited by all processes of Serve; 1.5 times the requests per second
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    with importing("PyTorch and Ray Serve"):
        import ray

        from pipeline.clip.load import fetch_weights
        from pipeline.prediction.load import read_model
        from pipeline.runtime.cluster import WorkerResources, connect
        from pipeline.serving.http_api import Limits
        from pipeline.serving.service import ServiceOptions, port_error, running_service, watch_service
        from pipeline.serving.shared_clip import check_one_clip

    pretrained = arguments.fields.get("clip.pretrained")
    adapters: NamedAdapters = {name: read_model(source, pretrained)[:2] for name, source in sources.items()}
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
            replicas=job.replicas,
            ingress_replicas=job.ingress_replicas,
            worker_resources=WorkerResources(cluster.cpus_per_worker, gpus),
            max_batch=job.max_batch,
            batch_wait_s=job.batch_wait_ms / 1000,
            limits=Limits(
                max_request_bytes=int(job.max_request_mib * MIB),
                max_images=job.max_images,
                max_waiting=job.max_waiting,
                timeout_s=job.timeout_s,
                decoding_threads=usable_cpus()[0],
            ),
        )
        with running_service(adapters, options, print_status, ends_with_ray=is_local):
            served = "; ".join(f"{name}: {', '.join(adapter.class_names)}" for name, (adapter, _) in adapters.items())
            print_status(
                f"ready: http://{job.host}:{job.port}, {options.replicas} x {options.worker_resources}; {served}"
            )
            try:
                watch_service(options, print_status)
            except KeyboardInterrupt:
                forget_signals()
                print_status("stopping: pending requests are still answered; interrupt again to stop immediately")
    finally:
        ray.shutdown()


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """Parse NAME=SOURCE of each model; UserError if one is malformed or a name occurs twice."""
    sources: dict[str, str] = {}
    for model in models:
        name, _, source = model.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name) or not source:
            raise UserError(f"--models {model}: expected NAME=SOURCE, with a name of letters, digits, `_`, `.`, `-`")
        if name in sources:
            raise UserError(f"--models {model}: duplicate name {name!r}")
        sources[name] = source
    return sources


if __name__ == "__main__":
    main()
