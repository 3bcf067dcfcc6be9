#!/usr/bin/env python
"""Images per second of each step of the input pipeline, ours against simple loops.

    python benchmarks/input_speed.py                                      all cases, on generated JPEGs
    python benchmarks/input_speed.py --cases decoding evaluation --images 20000 --threads 16

Cases:
- splits: image folders -> checked few-shot splits in Parquet, by a pool of worker processes (instead of Ray tasks),
  against a loop that opens each image with PIL and copies the files into train and test folders;
- decoding: test images -> pixels, by the evaluation's stream with one thread, with all, with as many processes, and
  with clip.jpeg_draft, against a loop of PIL and torchvision's transforms;
- training: decoded once and augmented batch by batch, against a loop that opens and augments each image in every
  step with torchvision's RandomResizedCrop, over `--epochs` epochs;
- evaluation: test set -> predictions with the model running while images are decoded, against decoding all and then
  running the model;
- overlap: the same with a fake GPU model, which uses no CPU cores and is as slow as decoding.

Files were just written, so they are read from the page cache. On a CPU the model and decoding share the cores, so
overlapping them gains little there. Versions are interleaved, and the fastest run of each counts. Prints Markdown
tables and writes benchmarks/results/input_speed_<device>.json, with the size if it is not the default.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import PIL
import torch
from common import default_device, device_name, load, median_seconds, table, write_results
from PIL import Image

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import AugmentationConfig, DataConfig, TrainingConfig
from pipeline.data.index import index_dataset
from pipeline.data.parquet import SplitDescription, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.splits import content_fingerprint, sample_splits
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.classifier import Classifier
from pipeline.training.batches import batch_indices, load_training_sets
from pipeline.training.evaluate import decoded_batches, evaluate
from pipeline.training.trainer import num_steps_per_epoch

TASKS = ("art", "clip", "product", "real")
CLASSES = ("ant", "bear", "cat", "dog", "eel")
SHOTS = 6
IMAGE_SIZE = 224
PREPROCESSING = Preprocessing(IMAGE_SIZE)
OVERLAP_PASSES = 4
SIZE = "500x400"
BATCH_SIZE = TrainingConfig().batch_size
Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    folder: Path
    """Temporary folder; the images are in `folder`/images."""
    images: int
    threads: int
    repeats: int
    epochs: int
    model: str
    device: torch.device
    pool: Executor

    @property
    def root(self) -> Path:
        return self.folder / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=400, help="number of images, sum over tasks")
    parser.add_argument("--size", default=SIZE, help="width x height of the JPEGs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="decoding threads, worker processes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each version; the median counts")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the training case")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model name of the evaluation case")
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    if arguments.images < len(TASKS) * len(CLASSES) * (SHOTS + 1):
        parser.error(f"--images: needs {SHOTS + 1} images for each of {len(CLASSES)} classes in {len(TASKS)} tasks")
    ensure_torchvision()
    device = torch.device(arguments.device)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(arguments.threads, context) as pool,
    ):
        setting = Setting(
            Path(folder),
            arguments.images,
            arguments.threads,
            arguments.repeats,
            arguments.epochs,
            arguments.model,
            device,
            pool,
        )
        bytes_per_image = write_photos(setting, *map(int, arguments.size.split("x")))
        build_splits(setting, "splits")
        rows = {case: CASES[case](setting) for case in arguments.cases}

    print(
        f"{device_name(device)}, {os.cpu_count()} cores, {arguments.threads} threads, Pillow {PIL.__version__}, "
        f"{arguments.images} JPEGs of {arguments.size} ({bytes_per_image / 1024:.0f} KiB), "
        f"median of {arguments.repeats}\n"
    )
    for case, case_rows in rows.items():
        columns = [case, "images", "s", "images/s", "ratio"]
        lines = [
            [row["version"], row["images"], f"{row['s']:.2f}", f"{row['images/s']:.0f}", f"{row['ratio']:.2f}"]
            for row in case_rows
        ]
        print(table(columns, lines), end="\n\n")
    machine = {"cores": os.cpu_count(), "Pillow": PIL.__version__, "bytes per image": round(bytes_per_image)}
    name = "input_speed" if arguments.size == SIZE else f"input_speed_{arguments.size}"
    write_results(name, device, {**machine, **vars(arguments), "rows": rows})


def make_rows(seconds: dict[str, float], images: int) -> list[Row]:
    """Return the rows of a table, with ratios of speed to the first version."""
    baseline = next(iter(seconds.values()))
    return [
        {"version": name, "images": images, "s": value, "images/s": images / value, "ratio": baseline / value}
        for name, value in seconds.items()
    ]


# --- images ----------------------------------------------------------------------------------------------------------


def write_photos(setting: Setting, width: int, height: int) -> float:
    """Write the images as <task>/<class>/<number>.jpg, and return their mean size in bytes."""
    folders = [setting.root / task / name for task in TASKS for name in CLASSES]
    for folder in folders:
        folder.mkdir(parents=True)
    paths = [folders[number % len(folders)] / f"{number:06d}.jpg" for number in range(setting.images)]
    write = partial(write_photo, width=width, height=height)
    return sum(setting.pool.map(write, paths, range(setting.images), chunksize=16)) / setting.images


def write_photo(path: Path, seed: int, width: int, height: int) -> int:
    """Write a JPEG of smooth colors at two scales with sensor noise, and return its size in bytes."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, weight in ((6, 0.6), (40, 0.4)):
        field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += weight * np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
    pixels += rng.normal(0, 6, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return path.write_bytes(stream.getvalue())


# --- splits ----------------------------------------------------------------------------------------------------------


def splits(setting: Setting) -> list[Row]:
    versions = {
        "PIL loop that copies files": lambda: split_by_copying(setting),
        f"ours, {setting.threads} processes": lambda: build_splits(setting, "timed_splits"),
    }
    return make_rows(median_seconds(versions, setting.repeats, setting.device), setting.images)


def build_splits(setting: Setting, name: str) -> None:
    """Build splits as the pipeline's stage, with the pool instead of Ray."""
    dataset = index_dataset(DataConfig(), setting.root)
    folder, pool = setting.folder / name, setting.pool
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [(image.path, image.task, image.class_folder) for image in dataset.images]
    images = list(pool.map(partial(scan_image, dataset.root), *zip(*arguments), chunksize=32))
    assert not any(image.error for image in images)
    sampled = sample_splits(images, dataset.classes, SHOTS, seed=1)
    counts = {
        split: {task: sum(image.task == task for image in getattr(sampled, split)) for task in dataset.classes}
        for split in ("train", "test")
    }
    classes = {task: list(names) for task, names in dataset.classes.items()}
    description = SplitDescription(classes, dataset.class_names, SHOTS, 1, content_fingerprint(images), counts)
    sizes = {image.path: image.size for image in dataset.images}
    parts = plan_parts(sampled.train, "train", sizes) + plan_parts(sampled.test, "test", sizes)
    list(pool.map(partial(write_part, dataset.root, description=description, folder=folder), parts))
    (folder / "splits.json").write_text(json.dumps(asdict(description)))


def split_by_copying(setting: Setting) -> None:
    target = setting.folder / "copies"
    shutil.rmtree(target, ignore_errors=True)
    rng = random.Random(1)
    for task in sorted(os.listdir(setting.root)):
        for name in sorted(os.listdir(setting.root / task)):
            source = setting.root / task / name
            files = []
            for file in sorted(os.listdir(source)):
                with Image.open(source / file) as image:
                    image.convert("RGB")
                files.append(file)
            train = set(rng.sample(files, SHOTS))
            for split in ("train", "test"):
                (target / split / task / name).mkdir(parents=True)
            for file in files:
                shutil.copyfile(source / file, target / ("train" if file in train else "test") / task / name / file)


# --- decoding --------------------------------------------------------------------------------------------------------


def open_reader(setting: Setting) -> SplitReader:
    return SplitReader(setting.folder / "splits")


def image_paths(setting: Setting, split: str, task: str) -> list[Path]:
    return [setting.root / row["path"] for row in open_reader(setting).rows(split, task, ("path",))]


def decoding(setting: Setting) -> list[Row]:
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.Resize(IMAGE_SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
        ]
    )
    reader = open_reader(setting)
    paths = [path for task in TASKS for path in image_paths(setting, "test", task)]

    def reference() -> None:
        for path in paths:
            with Image.open(path) as image:
                steps(image.convert("RGB"))

    def ours(threads: int, use_processes: bool = False, preprocessing: Preprocessing = PREPROCESSING) -> None:
        limits = {"MAX_THREADS": 0, "MIN_IMAGES": 0} if use_processes else {"MAX_THREADS": threads}
        with patch.multiple("pipeline.data.decoding_pool", **limits):
            for _ in decoded_batches(reader, TASKS, preprocessing, threads):
                pass

    versions = {"PIL and torchvision loop": reference}
    for threads in sorted({1, setting.threads}):
        versions[f"ours, {threads} thread{'s' * (threads > 1)}"] = partial(ours, threads)
    versions[f"ours, {setting.threads} processes, with their start"] = partial(
        ours, setting.threads, use_processes=True
    )
    draft = replace(PREPROCESSING, jpeg_draft=True)
    versions[f"ours, {setting.threads} threads, jpeg_draft"] = partial(ours, setting.threads, preprocessing=draft)
    return make_rows(median_seconds(versions, setting.repeats, setting.device), len(paths))


# --- training --------------------------------------------------------------------------------------------------------


def training(setting: Setting) -> list[Row]:
    from torchvision import transforms

    config, device, reader = AugmentationConfig(), setting.device, open_reader(setting)
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                IMAGE_SIZE,
                config.crop_scale,
                (1 / config.crop_ratio, config.crop_ratio),
                transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    paths = {task: image_paths(setting, "train", task) for task in TASKS}

    def sets():
        return load_training_sets(reader, TASKS, PREPROCESSING, config.random_crop, device, setting.threads)

    num_steps = setting.epochs * num_steps_per_epoch(map(len, sets()), BATCH_SIZE)

    def ours() -> None:
        loaded = sets()
        for step in range(num_steps):
            for task in loaded:
                task.batch(step, BATCH_SIZE, PREPROCESSING, config, seed=1)

    def reference() -> None:
        for step in range(num_steps):
            for task in TASKS:
                pixels = []
                for index in batch_indices(len(paths[task]), BATCH_SIZE, step, seed=1):
                    with Image.open(paths[task][index]) as image:
                        pixels.append(steps(image.convert("RGB")))
                torch.stack(pixels).to(device)

    versions = {"PIL and torchvision loop": reference, f"ours, decoded once for {setting.epochs} epochs": ours}
    return make_rows(median_seconds(versions, setting.repeats, setting.device), num_steps * len(TASKS) * BATCH_SIZE)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation(setting: Setting) -> list[Row]:
    _, towers = load(setting.model, setting.device)
    tokens = class_tokens(towers.tokenizer, "a photo of a {}.", [CLASSES] * len(TASKS))
    classifier = Classifier(towers, [(TASKS, tokens, Adaptation())])
    reader = open_reader(setting)
    batches: list[tuple] = []

    def decode() -> None:
        batches[:] = decoded_batches(reader, TASKS, towers.preprocessing, setting.threads)

    def run_model() -> None:
        for task, _, pixels in batches:
            for values in classifier.probabilities(task, pixels).max(dim=1):
                values.tolist()

    versions = {
        "decoding alone": decode,
        "model alone": run_model,
        "overlapped": lambda: evaluate(classifier, reader, TASKS, setting.threads),
    }
    seconds = median_seconds(versions, setting.repeats, setting.device)
    sequential = seconds["decoding alone"] + seconds["model alone"]
    images = sum(len(rows) for _, rows, _ in batches)
    return make_rows({"decoding, then the model (sum)": sequential, **seconds}, images)


# --- overlap ---------------------------------------------------------------------------------------------------------


class FakeGpuModel:
    """Stand-in for a model on a GPU: uses no CPU cores and takes a given time per image."""

    def __init__(self, seconds_per_image: float):
        self.seconds_per_image = seconds_per_image
        self.towers = SimpleNamespace(preprocessing=PREPROCESSING, device=torch.device("cpu"))

    def probabilities(self, task: str, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(len(pixels) * self.seconds_per_image)
        return torch.ones(len(pixels), 1)


def overlap(setting: Setting) -> list[Row]:
    reader, tasks = open_reader(setting), TASKS * OVERLAP_PASSES

    def decode() -> int:
        return sum(len(rows) for _, rows, _ in decoded_batches(reader, tasks, PREPROCESSING, setting.threads))

    images, start = decode(), time.perf_counter()
    decode()
    model = FakeGpuModel((time.perf_counter() - start) / images)  # as slow as decoding, where overlap helps most
    versions = {
        "decoding alone": decode,
        "model alone": lambda: time.sleep(images * model.seconds_per_image),
        "overlapped": lambda: evaluate(model, reader, tasks, setting.threads),
    }
    seconds = median_seconds(versions, setting.repeats, setting.device)
    sequential = sum(seconds[name] for name in list(seconds)[:2])
    return make_rows({"decoding, then the model (sum)": sequential, **seconds}, images)


CASES = {
    "splits": splits,
    "decoding": decoding,
    "training": training,
    "evaluation": evaluation,
    "overlap": overlap,
}

if __name__ == "__main__":
    main()
