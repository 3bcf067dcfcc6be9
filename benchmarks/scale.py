#!/usr/bin/env python
"""Peak memory and throughput of the pipeline on a generated data set of MiniDomainNet's size.

    python benchmarks/scale.py /data/scratch                        140,000 images, 126 classes, 4 tasks
    python benchmarks/scale.py /data/scratch --images 2000 --classes 10
    python benchmarks/scale.py /data/scratch --images 5000 --model ViT-B-32 --precision float32

The images are distinct JPEGs of smooth random colors with sides of 96 to 160 pixels; the model is the demo's tiny CLIP,
or an open_clip model with random weights. Reports for each job the seconds, images per second, and peak proportional
set size of the driver and its child processes, including Ray's object store, sampled twice per second; then images per
second of decoding alone and of the image tower alone, each on all cores: an evaluation is bound by the slower. With
fewer than 140,000 images, seconds for those are extrapolated in proportion.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from common import REPOSITORY, class_names, table, write_results
from PIL import Image

from pipeline.clip.load import load_clip
from pipeline.clip.precision import autocast
from pipeline.config import BUILTIN_DIGITS, ClipConfig
from pipeline.data.images import evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.files import atomic_replace
from pipeline.training.evaluate import BATCH_SIZE

TASKS = ("clipart", "painting", "real", "sketch")
JOBS = {
    "check": ("jobs/check_data.py", "--data.shots"),
    "few-shot splits": ("jobs/build_splits.py", "--data.shots"),
    "zero-shot evaluation": ("jobs/benchmark.py", "--methods", "zero_shot", "--seeds", "1", "--shots"),
}
"""Each job uses the artifacts of the previous one."""
POLL_INTERVAL_S = 0.5
FULL_SIZE = 140_000
MODEL_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the images and the storage; needs several GB")
    parser.add_argument("--images", type=int, default=FULL_SIZE)
    parser.add_argument("--classes", type=int, default=126)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--model", default=BUILTIN_DIGITS, help="open_clip model, with random weights")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    arguments = parser.parse_args()
    root = arguments.folder / f"images-{arguments.images}-{arguments.classes}"
    if not root.is_dir():
        make_images(root, arguments.images, arguments.classes)
    pretrained = BUILTIN_DIGITS if arguments.model == BUILTIN_DIGITS else None
    clip = ClipConfig(model=arguments.model, pretrained=pretrained, precision=arguments.precision)
    options = [f"--clip.{name}={getattr(clip, name) or 'null'}" for name in ("model", "pretrained", "precision")]
    rows = []
    for name, job in JOBS.items():
        command = [*job, str(arguments.shots), "--storage", str(arguments.folder / "storage"), "--data.root", str(root)]
        command += ["--config", "configs/demo.yaml", "--data.use_official_splits=false", *options]
        num_images = arguments.images
        if name == "zero-shot evaluation":
            num_images -= arguments.shots * arguments.classes * len(TASKS)
        seconds, peak = run_measured([sys.executable, *command])
        rows.append(make_row(name, num_images, seconds, f"{peak / 2**30:.2f}"))
    rows += measure_parts(clip, sorted(root.rglob("*.jpg")))
    columns = ["job", "images", "s", "images/s", "peak, GiB"]
    if arguments.images < FULL_SIZE:
        columns.append(f"s for {FULL_SIZE:,} images, extrapolated")
    rows = [row[: len(columns)] for row in rows]
    print(table(columns, rows))
    values = {name: getattr(arguments, name) for name in ("images", "classes", "model", "precision")}
    suffix = "" if pretrained else f"_{arguments.model}_{arguments.precision}"
    results = [dict(zip(columns, row)) for row in rows]
    write_results(f"scale{suffix}", torch.device("cpu"), {**values, "rows": results})


def make_row(name: str, images: int, seconds: float, peak: str = "") -> list[str]:
    rate = images / seconds
    return [name, f"{images}", f"{seconds:.1f}", f"{rate:.0f}", peak, f"{FULL_SIZE / rate:.0f}"]


@torch.no_grad()
def measure_parts(clip: ClipConfig, files: Sequence[Path]) -> list[list[str]]:
    """Return rows of decoding the files, and of the image tower on some images, each on all cores."""
    towers = load_clip(clip)
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        images = sum(threads.map(partial(_decode, towers.preprocessing), files))
    decoding = make_row("decoding alone", images, time.perf_counter() - start)
    size, seconds = towers.preprocessing.image_size, []
    batch = torch.randint(0, 256, (BATCH_SIZE, 3, size, size), dtype=torch.uint8)
    for _ in range(1 + MODEL_BATCHES):
        start = time.perf_counter()
        with autocast(towers.device, clip.precision):
            towers.encode_image(towers.normalize_pixels(batch))
        seconds.append(time.perf_counter() - start)
    model = make_row("image tower alone", MODEL_BATCHES * BATCH_SIZE, sum(seconds[1:]))  # the first warms up
    return [decoding, model]


def _decode(preprocessing: Preprocessing, file: Path) -> bool:
    return evaluation_pixels(file.read_bytes(), preprocessing).size > 0


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
