#!/usr/bin/env python
"""Peak memory and throughput of the pipeline on a generated data set of MiniDomainNet's size.

    python benchmarks/scale.py /data/scratch                        140,000 images, 126 classes, 4 tasks
    python benchmarks/scale.py /data/scratch --images 2000 --classes 10

The images are distinct JPEGs of smooth random colors with sides of 96 to 160 pixels; the model is the demo's tiny CLIP.
Reports for each job the seconds, images per second, and peak proportional set size of the driver and its child
processes, including Ray's object store, sampled twice per second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from common import REPOSITORY, class_names, table, write_results
from PIL import Image

from pipeline.files import atomic_replace

TASKS = ("clipart", "painting", "real", "sketch")
JOBS = {
    "check": ("jobs/check_data.py", "--data.shots"),
    "few-shot splits": ("jobs/build_splits.py", "--data.shots"),
    "zero-shot evaluation": ("jobs/benchmark.py", "--methods", "zero_shot", "--seeds", "1", "--shots"),
}
"""Each job uses the artifacts of the previous one."""
POLL_INTERVAL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the images and the storage; needs several GB")
    parser.add_argument("--images", type=int, default=140_000)
    parser.add_argument("--classes", type=int, default=126)
    parser.add_argument("--shots", type=int, default=3)
    arguments = parser.parse_args()
    root = arguments.folder / f"images-{arguments.images}-{arguments.classes}"
    if not root.is_dir():
        make_images(root, arguments.images, arguments.classes)
    rows = []
    for name, job in JOBS.items():
        command = [*job, str(arguments.shots), "--storage", str(arguments.folder / "storage"), "--data.root", str(root)]
        command += ["--config", "configs/demo.yaml"]  # its CLIP is small, and the images are random
        seconds, peak = run_measured([sys.executable, *command])
        rows.append((name, f"{seconds:.0f}", f"{arguments.images / seconds:.0f}", f"{peak / 2**30:.2f}"))
    columns = ("job", "s", "images/s", "peak, GiB")
    print(table(columns, rows))
    values = {
        "images": arguments.images,
        "classes": arguments.classes,
        "rows": [dict(zip(columns, row)) for row in rows],
    }
    write_results("scale", torch.device("cpu"), values)


def make_images(root: Path, count: int, num_classes: int) -> None:
    names = class_names(num_classes)
    numbers = np.array_split(np.arange(count), 256)
    with atomic_replace(root) as staging_dir, ProcessPoolExecutor(os.cpu_count()) as workers:
        list(workers.map(partial(_write_images, staging_dir, names), numbers))


def _write_images(root: Path, names: list[str], numbers: np.ndarray) -> None:
    for number in numbers.tolist():
        rng = np.random.default_rng(number)
        folder = root / TASKS[number % len(TASKS)] / names[number // len(TASKS) % len(names)].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        size = rng.integers(96, 161, 2).tolist()
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06}.jpg", quality=85)


def run_measured(command: list[str]) -> tuple[float, int]:
    """Run a job and return its seconds and peak memory in bytes. Raises: SystemExit: the job failed."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(map(_proportional_size, [root, *_children(root)])))
        time.sleep(POLL_INTERVAL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return time.monotonic() - start, peak


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _proportional_size(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it has exited
        return 0


if __name__ == "__main__":
    main()
