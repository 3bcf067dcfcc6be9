#!/usr/bin/env python
"""Overhead of Ray, MLflow and storage: the pipeline on a running Ray against the same computation in one process.

    python benchmarks/pipeline_overhead.py                         the demo
    python benchmarks/pipeline_overhead.py --repeats 3

Measures, interleaved: the pipeline's wall time from start to exit, on a running Ray; the sum of its stages' seconds;
and the wall time of one process without Ray and MLflow that builds the splits, trains the global prompt, groups, trains
the same groups and evaluates, sequentially. Both must have the same accuracies. On two cores the pipeline runs two
trainings at a time, the single process one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import REPOSITORY, job_environment, table, write_results

from pipeline.config import DEMO_CONFIG, load_yaml, parse_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="the median counts")
    parser.add_argument("--single-process", type=Path, help=argparse.SUPPRESS)  # storage of the single process
    arguments = parser.parse_args()
    if arguments.single_process:
        run_demo_in_one_process(arguments.single_process)
        return
    pipeline_walls, stage_sums, single_walls = [], [], []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory(prefix="ray-") as folder:
            address, ray = start_ray(folder)
            try:
                storage = Path(folder) / "storage"
                job = [sys.executable, "jobs/full_pipeline.py", "--storage", str(storage), "--cluster.address", address]
                pipeline_walls.append(wall_seconds(job))
            finally:
                ray.terminate()
                ray.wait()
            (run,) = (storage / "runs").iterdir()
            stage_sums.append(sum(json.loads((run / "stage_seconds.json").read_text()).values()))
            single_folder = Path(folder) / "single_process"
            single_walls.append(wall_seconds([sys.executable, __file__, "--single-process", str(single_folder)]))
            ours = json.loads((run / "report" / "summary.json").read_text())["methods"]
            expected = json.loads((single_folder / "accuracy.json").read_text())
            accuracies = {name: ours[name]["accuracy"] for name in expected}
            if accuracies != expected:
                sys.exit(f"the accuracies differ: {accuracies} and {expected}")

    walls = {
        "pipeline": median(pipeline_walls),
        "its stages": median(stage_sums),
        "single process": median(single_walls),
    }
    print(f"demo, {os.cpu_count()} CPU cores, torch {torch.__version__}, median of {arguments.repeats}\n")
    print(
        table(
            ["", "s", "pipeline / this"],
            [[k, f"{v:.1f}", f"{walls['pipeline'] / v:.2f}"] for k, v in walls.items()],
        )
    )
    write_results("pipeline_overhead", torch.device("cpu"), {"seconds": walls, "repeats": arguments.repeats})


def wall_seconds(command: list[str]) -> float:
    start = time.perf_counter()
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=job_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if finished.returncode:
        sys.exit(finished.stdout.decode())
    return time.perf_counter() - start


def run_demo_in_one_process(folder: Path) -> None:
    # Lazily: the other processes of this benchmark need no training code.
    from single_process import run_in_one_process

    from pipeline.demo.digits import write_digits

    torch.set_num_threads(1)
    write_digits(folder / "digits")
    accuracies = run_in_one_process(parse_config(load_yaml(DEMO_CONFIG)), folder / "digits", folder)
    (folder / "accuracy.json").write_text(json.dumps(accuracies))


def start_ray(folder: str) -> tuple[str, subprocess.Popen]:
    """Start a Ray head with this machine's cores on a free port, and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", "--port", str(port), "--include-dashboard=false", "--temp-dir", f"{folder}/ray"]
    with open(f"{folder}/ray.log", "wb") as log:
        head = subprocess.Popen([ray, "start", *options], env=job_environment(), stdout=log, stderr=subprocess.STDOUT)
    address = f"127.0.0.1:{port}"
    ready = f"import ray; ray.init('{address}', log_to_driver=False); ray.get(ray.remote(lambda: None).remote())"
    while subprocess.run([sys.executable, "-c", ready], env=job_environment(), capture_output=True).returncode:
        if head.poll() is not None:
            sys.exit(Path(f"{folder}/ray.log").read_text())
    return address, head


if __name__ == "__main__":
    main()
