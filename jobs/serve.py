#!/usr/bin/env python
"""Answers over HTTP what images show: one or several trained models on one CLIP, by Ray Serve, till Ctrl-C or SIGTERM.

    python jobs/serve.py --models digits=mmap-runs/runs/<run>
    python jobs/serve.py --models a=mmap-runs/runs/<run> b=models:/digits@champion --replicas 2 --port 8000

    curl localhost:8000/models
    curl 'localhost:8000/models/digits/predict?task=ink' -H 'Content-Type: image/png' --data-binary @photo.png

The models must have been trained on the same CLIP, whose weights each replica holds once. All paths, answers and
limits are in docs/serving.md. There is no password: who can reach the address can use it.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.command_line import report_user_errors, say
from pipeline.config import Given, JobOptions, JobParser, parse_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.serving.shared_clip import Trained

MIB = 2**20


class Options(JobOptions):
    models: tuple[str, ...] = Field(
        description="NAME=PLACE of each model: its name in the paths, and prompts/*.safetensors of a run, its folder, "
        "either in a bucket, or models:/..., runs:/... of MLflow."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    max_request_mib: float = Field(10, gt=0, lt=4096, description="Largest body of a request, MiB.")
    max_images: int = Field(64, ge=1, description="Most images of one request.")
    max_waiting: int = Field(256, ge=1, description="Requests that an ingress holds; more are told to come again.")
    timeout_s: float = Field(60, gt=0, description="Seconds for one request.")
    replicas: int = Field(1, ge=1, description="Replicas, each of which holds all models.")
    max_batch: int = Field(64, ge=1, description="Images that a replica takes at once.")
    batch_wait_ms: float = Field(5, ge=0, description="How long a request waits for others to fill the batch.")
    ingress_replicas: int = Field(1, ge=1, description="Ingresses, which read and decode images.")


TAKES = {
    "clip.pretrained": "Tag or file of the CLIP weights; null: where they lay in training.",
    "cluster.address": "Ray cluster to join; null: RAY_ADDRESS, else a local Ray is started.",
    "cluster.gpus_per_worker": "GPUs of a replica, or a fraction; null: 1 if there are any.",
    "cluster.cpus_per_worker": "CPU cores of a replica, without GPUs also its threads; null: 1.",
}


def main() -> None:
    with report_user_errors():
        serve(JobParser(__doc__, Options, TAKES).given())


def serve(given: Given[Options]) -> None:
    own, cluster = given.own, parse_config(given.nested()).cluster
    places = named_places(own.models)

    from pipeline.prediction.load import read_model  # torch takes seconds to import
    from pipeline.serving.shared_clip import check_one_clip

    pretrained = given.fields.get("clip.pretrained")
    trained: Trained = {name: read_model(place, pretrained)[:2] for name, place in places.items()}
    check_one_clip(trained)
    is_local = (cluster.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    if is_local:  # all of Serve's processes inherit it; half as many requests a second again as without
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")

    import ray

    from pipeline.runtime.cluster import WorkerResources, connect
    from pipeline.serving.http_api import Limits
    from pipeline.serving.service import ServiceOptions, port_error, running_service, watch_service

    if is_local and (fault := port_error(own.host, own.port)):
        raise UserError(fault)
    connect(cluster.model_copy(update={"cpus_per_worker": 1, "gpus_per_worker": 0}), say)
    for ends in (signal.SIGINT, signal.SIGTERM):  # Ray has its own for SIGTERM
        signal.signal(ends, signal.default_int_handler)
    try:
        gpus = cluster.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        options = ServiceOptions(
            host=own.host,
            port=own.port,
            replicas=own.replicas,
            ingress_replicas=own.ingress_replicas,
            worker_resources=WorkerResources(cluster.cpus_per_worker, gpus),
            max_batch=own.max_batch,
            batch_wait_s=own.batch_wait_ms / 1000,
            limits=Limits(
                max_request_bytes=int(own.max_request_mib * MIB),
                max_images=own.max_images,
                max_waiting=own.max_waiting,
                timeout_s=own.timeout_s,
                decoding_threads=len(os.sched_getaffinity(0)),
            ),
        )
        with running_service(trained, options, ends_with_ray=is_local):
            served = "; ".join(f"{name}: {', '.join(prompts.class_names)}" for name, (prompts, _) in trained.items())
            say(f"ready: http://{own.host}:{own.port}, {options.replicas} x {options.worker_resources}; {served}")
            try:
                watch_service(options, say)
            except KeyboardInterrupt:
                say("ending: requests that are waiting get their answers; once more ends at once")
    except KeyboardInterrupt:
        raise UserError("ended before it was ready, or before all was answered") from None
    finally:
        ray.shutdown()


def named_places(given: Sequence[str]) -> dict[str, str]:
    """Raises: UserError: no NAME=PLACE, a name twice."""
    places: dict[str, str] = {}
    for model in given:
        name, _, place = model.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name) or not place:
            raise UserError(f"--models {model}: give NAME=PLACE, with a name of letters, digits, `_`, `.`, `-`")
        if name in places:
            raise UserError(f"--models {model}: there is a model {name!r} already; give each its own name")
        places[name] = place
    return places


if __name__ == "__main__":
    main()
