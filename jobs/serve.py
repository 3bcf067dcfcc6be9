#!/usr/bin/env python
"""Answers over HTTP what images show: one or several trained models on one CLIP, by Ray Serve, till Ctrl-C or SIGTERM.

    python jobs/serve.py --model digits=mmap-runs/runs/<run>
    python jobs/serve.py --model a=mmap-runs/runs/<run> --model b=models:/digits@champion --replicas 2 --port 8000

    curl localhost:8000/models
    curl 'localhost:8000/models/digits/predict?task=ink' -H 'Content-Type: image/png' --data-binary @photo.png

The models must have been trained on the same CLIP, whose weights each replica holds once. All paths, answers and
limits are in docs/serving.md. There is no password: who can reach the address can use it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

from pipeline.config import parse_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.serving.shared_clip import Trained

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=PLACE",
        help="name in the paths, and prompts/*.safetensors of a run, its folder, either in a bucket, or models:/..., "
        "runs:/... of MLflow; once for each model",
    )
    parser.add_argument("--pretrained", metavar="TAG_OR_FILE", help="CLIP weights, if not where they lay in training")
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    http.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    http.add_argument(
        "--max-request-mib", type=float, default=10, help="largest body of a request, MiB (default: %(default)s)"
    )
    http.add_argument("--max-images", type=int, default=64, help="of one request (default: %(default)s)")
    http.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        help="requests that an ingress holds at once; more are told to come again (default: %(default)s)",
    )
    http.add_argument("--timeout-s", type=float, default=60, help="for one request (default: %(default)s)")
    ray = parser.add_argument_group("replicas", "Each replica holds all models; an ingress reads and decodes images.")
    ray.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local Ray is started)")
    ray.add_argument("--replicas", type=int, default=1, help="(default: %(default)s)")
    ray.add_argument("--gpus-per-replica", type=float, help="GPUs, or a fraction (default: 1 if there are any)")
    ray.add_argument("--cpus-per-replica", type=int, default=1, help="CPU cores; without GPUs also its threads")
    ray.add_argument("--max-batch", type=int, default=64, help="images the model takes at once (default: %(default)s)")
    ray.add_argument(
        "--batch-wait-ms",
        type=float,
        default=5,
        help="how long a request waits for others to fill the batch (default: %(default)s)",
    )
    ray.add_argument("--ingress-replicas", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    try:
        serve(arguments)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(arguments: argparse.Namespace) -> None:
    check_numbers(arguments)
    places = named_places(arguments.model)

    from pipeline.prediction.load import read_model  # torch takes seconds to import
    from pipeline.serving.shared_clip import check_one_clip

    trained: Trained = {name: read_model(place, arguments.pretrained)[:2] for name, place in places.items()}
    check_one_clip(trained)
    is_local = (arguments.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    if is_local:  # all of Serve's processes inherit it; half as many requests a second again as without
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")

    import ray

    from pipeline.runtime.cluster import WorkerNeeds, connect
    from pipeline.serving.http_api import Limits
    from pipeline.serving.service import ServiceOptions, port_fault, running_service, watch_service

    if is_local and (fault := port_fault(arguments.host, arguments.port)):
        raise UserError(fault)
    smallest = {"address": arguments.address, "cpus_per_training": 1, "gpus_per_training": 0}
    connect(parse_config({"cluster": smallest}).cluster, say)
    for ends in (signal.SIGINT, signal.SIGTERM):  # Ray has its own for SIGTERM
        signal.signal(ends, signal.default_int_handler)
    try:
        gpus = arguments.gpus_per_replica
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        options = ServiceOptions(
            host=arguments.host,
            port=arguments.port,
            replicas=arguments.replicas,
            ingress_replicas=arguments.ingress_replicas,
            needs=WorkerNeeds(arguments.cpus_per_replica, gpus),
            max_batch=arguments.max_batch,
            batch_wait_s=arguments.batch_wait_ms / 1000,
            limits=Limits(
                max_request_bytes=int(arguments.max_request_mib * MIB),
                max_images=arguments.max_images,
                max_waiting=arguments.max_waiting,
                timeout_s=arguments.timeout_s,
                decoding_threads=len(os.sched_getaffinity(0)),
            ),
        )
        with running_service(trained, options, ends_with_ray=is_local):
            served = "; ".join(f"{name}: {', '.join(prompts.words)}" for name, (prompts, _) in trained.items())
            say(f"ready: http://{arguments.host}:{arguments.port}, {options.replicas} x {options.needs}; {served}")
            try:
                watch_service(options, say)
            except KeyboardInterrupt:
                say("ending: requests that are waiting get their answers; once more ends at once")
    except KeyboardInterrupt:
        raise UserError("ended before it was ready, or before all was answered") from None
    finally:
        ray.shutdown()


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises: UserError: one out of range."""
    for name, fits, remedy in [
        ("port", 1 <= arguments.port <= 65535, "1 to 65535"),
        ("max_request_mib", 0 < arguments.max_request_mib < 4096, "more than 0, less than 4096"),
        ("max_images", arguments.max_images >= 1, "1 or more"),
        ("max_waiting", arguments.max_waiting >= 1, "1 or more"),
        ("timeout_s", 0 < arguments.timeout_s < float("inf"), "more than 0"),
        ("replicas", arguments.replicas >= 1, "1 or more"),
        ("gpus_per_replica", 0 <= (arguments.gpus_per_replica or 0) < float("inf"), "0 or more"),
        ("cpus_per_replica", arguments.cpus_per_replica >= 1, "1 or more"),
        ("max_batch", arguments.max_batch >= 1, "1 or more"),
        ("batch_wait_ms", 0 <= arguments.batch_wait_ms < float("inf"), "0 or more"),
        ("ingress_replicas", arguments.ingress_replicas >= 1, "1 or more"),
    ]:
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give {remedy}")


def named_places(given: list[str]) -> dict[str, str]:
    """Raises: UserError: no NAME=PLACE, a name twice."""
    places: dict[str, str] = {}
    for model in given:
        name, _, place = model.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name) or not place:
            raise UserError(f"--model {model}: give NAME=PLACE, with a name of letters, digits, `_`, `.`, `-`")
        if name in places:
            raise UserError(f"--model {model}: there is a model {name!r} already; give each its own name")
        places[name] = place
    return places


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
