#!/usr/bin/env python
"""Images per second of all that happens to images, ours against plain loops, side by side.

    python benchmarks/input_speed.py                                      all cases, on generated JPEGs
    python benchmarks/input_speed.py --cases decoding evaluation --images 20000 --threads 16

Cases:
- splits: image folders -> few-shot splits, checked and in Parquet, by a pool of worker processes (in place of Ray's
  tasks), against a loop that opens each image with PIL and copies the files into train and test folders;
- decoding: test images -> pixels, by the evaluation's stream with one thread and with all, against a loop of PIL and
  torchvision's transforms;
- training: decoded once and augmented batch by batch, against a loop that opens and augments each image in every
  step with torchvision's RandomResizedCrop, over `--epochs` epochs;
- evaluation: test set -> predictions with the model at work while images are decoded, against decoding all and then
  running the model.

Files were just written, so they are read from memory. On a CPU the model and decoding share the cores, so running
both at once can gain little there. Versions take turns, at least `--repeats` times and for `--seconds`, and the
fastest run of each counts. Prints Markdown tables and writes benchmarks/results/input_speed_<device>.json.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from pipeline.clip.classifier import Classifier  # noqa: E402
from pipeline.clip.torchvision_compat import ensure_torchvision  # noqa: E402
from pipeline.config import AugmentationConfig, DataConfig, TrainingConfig  # noqa: E402
from pipeline.data.find import find_images  # noqa: E402
from pipeline.data.parquet import SplitDescription, SplitReader, plan_parts, scan_image, write_part  # noqa: E402
from pipeline.data.splits import content_fingerprint, sample_splits  # noqa: E402
from pipeline.training.batches import batch_indices, load_training_sets  # noqa: E402
from pipeline.training.evaluate import decoded_batches, evaluate  # noqa: E402
from pipeline.training.loop import num_steps_per_epoch  # noqa: E402

TASKS = ("art", "clip", "product", "real")
CLASSES = ("ant", "bear", "cat", "dog", "eel")
SHOTS = 6
IMAGE_SIZE = 224
BATCH_SIZE = TrainingConfig().batch_size
Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    folder: Path
    """Scratch; the images lie in `folder`/images."""
    images: int
    threads: int
    repeats: int
    seconds: float
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
    parser.add_argument("--images", type=int, default=400, help="images of all tasks together")
    parser.add_argument("--size", default="500x400", help="width x height of the JPEGs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="decoding threads, worker processes")
    parser.add_argument("--repeats", type=int, default=2, help="least runs of each version")
    parser.add_argument("--seconds", type=float, default=20, help="least time of a case")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the case training")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model name of the case evaluation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.images < len(TASKS) * len(CLASSES) * (SHOTS + 1):
        parser.error(f"--images: {SHOTS} train and one tests of each of {len(CLASSES)} classes in {len(TASKS)} tasks")
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
            arguments.seconds,
            arguments.epochs,
            arguments.model,
            device,
            pool,
        )
        bytes_per_image = write_photos(setting, *map(int, arguments.size.split("x")))
        build_splits(setting, "splits")
        rows = {case: CASES[case](setting) for case in arguments.cases}

    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{where}, {cores} cores, {arguments.threads} threads, torch {torch.__version__}, Pillow {PIL.__version__}, "
        f"{arguments.images} JPEGs of {arguments.size} ({bytes_per_image / 1024:.0f} KiB), "
        f"fastest of {arguments.repeats} or more\n"
    )
    for case, of_case in rows.items():
        print(f"| {case} | images | s | images/s | ratio |\n|---|---:|---:|---:|---:|")
        for row in of_case:
            print(
                f"| {row['version']} | {row['images']} | {row['s']:.2f} | {row['images/s']:.0f} | {row['ratio']:.2f} |"
            )
        print()
    file = REPOSITORY / "benchmarks" / "results" / f"input_speed_{device.type}.json"
    file.parent.mkdir(exist_ok=True)
    machine = {
        "device": where,
        "cores": cores,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "Pillow": PIL.__version__,
        "processor": platform.machine(),
    }
    data = {"images": arguments.images, "size": arguments.size, "bytes of an image": round(bytes_per_image)}
    options = {"model": arguments.model, "epochs": arguments.epochs, "repeats": arguments.repeats}
    file.write_text(json.dumps({**machine, **data, **options, "cases": rows}, indent=1) + "\n")


def in_turn(setting: Setting, versions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Version → its fewest seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    began, rounds = time.perf_counter(), 0
    while rounds < setting.repeats or time.perf_counter() - began < setting.seconds:
        rounds += 1
        for name, version in versions.items():
            seconds[name].append(timed(version))
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: min(values) for name, values in seconds.items()}


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rows_of(seconds: dict[str, float], images: int) -> list[Row]:
    """Rows of a table; ratios of speed to the first version's."""
    first = next(iter(seconds.values()))
    return [
        {"version": name, "images": images, "s": value, "images/s": images / value, "ratio": first / value}
        for name, value in seconds.items()
    ]


# --- images ----------------------------------------------------------------------------------------------------------


def write_photos(setting: Setting, width: int, height: int) -> float:
    """Writes the images in the layout <task>/<class>/<number>.jpg; returns their mean bytes."""
    folders = [setting.root / task / name for task in TASKS for name in CLASSES]
    for folder in folders:
        folder.mkdir(parents=True)
    paths = [folders[number % len(folders)] / f"{number:06d}.jpg" for number in range(setting.images)]
    write = partial(write_photo, width=width, height=height)
    return sum(setting.pool.map(write, paths, range(setting.images), chunksize=16)) / setting.images


def write_photo(path: Path, seed: int, width: int, height: int) -> int:
    """A JPEG of smooth colours, coarse and finer ones, with a sensor's noise; returns its bytes."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, share in ((6, 0.6), (40, 0.4)):
        field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += share * np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
    pixels += rng.normal(0, 6, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return path.write_bytes(stream.getvalue())


# --- splits ----------------------------------------------------------------------------------------------------------


def splits(setting: Setting) -> list[Row]:
    versions = {
        "PIL loop that copies files": lambda: plain_splits(setting),
        f"ours, {setting.threads} processes": lambda: build_splits(setting, "again"),
    }
    return rows_of(in_turn(setting, versions), setting.images)


def build_splits(setting: Setting, name: str) -> None:
    """What the stage splits does, with the pool in place of Ray."""
    listing = find_images(DataConfig(), setting.root)
    folder, pool = setting.folder / name, setting.pool
    shutil.rmtree(folder, ignore_errors=True)
    named = [(image.path, image.task, image.class_folder) for image in listing.images]
    images = list(pool.map(partial(scan_image, listing.root), *zip(*named), chunksize=32))
    assert not any(image.error for image in images)
    drawn = sample_splits(images, listing.classes, SHOTS, seed=1)
    counts = {
        split: {task: sum(image.task == task for image in getattr(drawn, split)) for task in listing.classes}
        for split in ("train", "test")
    }
    classes = {task: list(names) for task, names in listing.classes.items()}
    description = SplitDescription(classes, listing.class_words, SHOTS, 1, content_fingerprint(images), counts)
    sizes = {image.path: image.size for image in listing.images}
    parts = plan_parts(drawn.train, "train", sizes) + plan_parts(drawn.test, "test", sizes)
    list(pool.map(partial(write_part, listing.root, description=description, folder=folder), parts))
    (folder / "splits.json").write_text(json.dumps(asdict(description)))


def plain_splits(setting: Setting) -> None:
    target = setting.folder / "copies"
    shutil.rmtree(target, ignore_errors=True)
    rng = random.Random(1)
    for task in sorted(os.listdir(setting.root)):
        for name in sorted(os.listdir(setting.root / task)):
            source = setting.root / task / name
            whole = []
            for file in sorted(os.listdir(source)):
                with Image.open(source / file) as image:
                    image.convert("RGB")
                whole.append(file)
            train = set(rng.sample(whole, SHOTS))
            for split in ("train", "test"):
                (target / split / task / name).mkdir(parents=True)
            for file in whole:
                shutil.copyfile(source / file, target / ("train" if file in train else "test") / task / name / file)


# --- decoding --------------------------------------------------------------------------------------------------------


def reader_of(setting: Setting) -> SplitReader:
    return SplitReader(setting.folder / "splits")


def paths_of(setting: Setting, split: str, task: str) -> list[Path]:
    return [setting.root / row["path"] for row in reader_of(setting).rows(split, task, ("path",))]


def decoding(setting: Setting) -> list[Row]:
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.Resize(IMAGE_SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
        ]
    )
    reader = reader_of(setting)
    paths = [path for task in TASKS for path in paths_of(setting, "test", task)]

    def plain() -> None:
        for path in paths:
            with Image.open(path) as image:
                steps(image.convert("RGB"))

    def ours(threads: int) -> None:
        for _ in decoded_batches(reader, TASKS, IMAGE_SIZE, threads):
            pass

    versions = {"PIL and torchvision loop": plain}
    for threads in sorted({1, setting.threads}):
        versions[f"ours, {threads} thread{'s' * (threads > 1)}"] = partial(ours, threads)
    return rows_of(in_turn(setting, versions), len(paths))


# --- training --------------------------------------------------------------------------------------------------------


def training(setting: Setting) -> list[Row]:
    from torchvision import transforms

    config, device, reader = AugmentationConfig(), setting.device, reader_of(setting)
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
    paths = {task: paths_of(setting, "train", task) for task in TASKS}

    def sets():
        return load_training_sets(reader, TASKS, IMAGE_SIZE, device, setting.threads)

    num_steps = setting.epochs * num_steps_per_epoch(sets(), BATCH_SIZE)

    def ours() -> None:
        loaded = sets()
        for step in range(num_steps):
            for task in loaded:
                task.batch(step, BATCH_SIZE, IMAGE_SIZE, config, seed=1)

    def plain() -> None:
        for step in range(num_steps):
            for task in TASKS:
                pixels = []
                for index in batch_indices(len(paths[task]), BATCH_SIZE, step, seed=1):
                    with Image.open(paths[task][index]) as image:
                        pixels.append(steps(image.convert("RGB")))
                torch.stack(pixels).to(device)

    versions = {"PIL and torchvision loop": plain, f"ours, decoded once for {setting.epochs} epochs": ours}
    return rows_of(in_turn(setting, versions), num_steps * len(TASKS) * BATCH_SIZE)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation(setting: Setting) -> list[Row]:
    import open_clip

    from pipeline.clip.towers import ClipTowers

    model = open_clip.create_model(setting.model)
    towers = ClipTowers(model, open_clip.get_tokenizer(setting.model)).to(setting.device)
    classifier = Classifier(towers, "a photo of a {}.", dict.fromkeys(TASKS, CLASSES))
    reader = reader_of(setting)
    batches: list[tuple] = []

    def decode() -> None:
        batches[:] = decoded_batches(reader, TASKS, towers.image_size, setting.threads)

    def run_model() -> None:
        for task, _, pixels in batches:
            for values in classifier.probabilities(task, pixels).max(dim=1):
                values.tolist()

    versions = {
        "decoding alone": decode,
        "model alone": run_model,
        "overlapped": lambda: evaluate(classifier, reader, TASKS, setting.threads),
    }
    seconds = in_turn(setting, versions)
    one_after_the_other = seconds["decoding alone"] + seconds["model alone"]
    images = sum(len(rows) for _, rows, _ in batches)
    return rows_of({"decoding, then the model (sum)": one_after_the_other, **seconds}, images)


CASES = {"splits": splits, "decoding": decoding, "training": training, "evaluation": evaluation}

if __name__ == "__main__":
    main()
