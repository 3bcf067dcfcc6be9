#!/usr/bin/env python
"""Classifies images with trained prompts; needs the prompts file and the CLIP weights.

    python jobs/predict.py --prompts mmap-runs/runs/<run>/prompts/grouped.safetensors --task ink photos/
    python jobs/predict.py --prompts s3://bucket/runs/<run> --task ink /data/photos --output predictions.parquet

Without --output, or with one that ends in .csv: a table of path, class, probability, error, made by this process.
With any other --output: a new folder of Parquet files of path, task, label, probability, error, made by Ray Data on
this machine or a cluster, of any number of images. A broken image gets an error instead of a class, and exit status 1.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.methods.prompt_file import TrainedPrompts
    from pipeline.prediction.options import ModelOptions

LINE_EVERY_S = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="folder of images, searched at all depths, or an image; for Parquet output also .parquet files with a "
        "column image of bytes and perhaps path and task, folders of these, and any of them in a bucket (s3://...)",
    )
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="PLACE",
        help="prompts/*.safetensors of a run, its folder, either in a bucket, or models:/..., runs:/... of MLflow",
    )
    parser.add_argument("--task", help="task whose prompts to use; may be left out if there is one only")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: standard output, as CSV)")
    parser.add_argument("--pretrained", metavar="TAG_OR_FILE", help="CLIP weights, if not where they lay in training")
    parser.add_argument("--temperature", type=float, help="what logits are divided by (default: as saved, else 1)")
    parser.add_argument("--threshold", type=float, help="probability below which an image is none of the classes")
    parser.add_argument("--device", help="for CSV output (default: cuda if there, else cpu)")
    ray = parser.add_argument_group("Parquet output", "Each worker holds the model.")
    ray.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local Ray is started)")
    ray.add_argument("--gpus-per-worker", type=float, help="GPUs, or a fraction (default: 1 if there are any)")
    ray.add_argument("--cpus-per-worker", type=int, default=1, help="CPU cores; without GPUs also its threads")
    arguments = parser.parse_args()
    try:
        return predict(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def predict(arguments: argparse.Namespace) -> int:
    to_csv = arguments.output is None or arguments.output.endswith(".csv")
    for name in ("address", "gpus_per_worker") if to_csv else ("device",):
        if getattr(arguments, name) is not None:
            kind, other = ("CSV", "--output <folder>.parquet") if to_csv else ("Parquet", "--gpus-per-worker")
            raise UserError(f"--{name.replace('_', '-')} means nothing for {kind} output: see {other}")

    from pipeline.prediction.load import read_model  # torch takes seconds to import

    prompts, options, _ = read_model(
        arguments.prompts, arguments.pretrained, arguments.temperature, arguments.threshold
    )
    tasks = list(prompts.words)
    task = arguments.task or (tasks[0] if len(tasks) == 1 else None)
    if to_csv:
        count, num_broken = predict_to_csv(arguments, prompts, options, task)
    else:
        count, num_broken = predict_to_parquet(arguments, prompts, options, task)
    if num_broken:
        print(f"{num_broken} of {count} images are broken; see the column error", file=sys.stderr)
    return 1 if num_broken else 0


def predict_to_csv(
    arguments: argparse.Namespace, prompts: TrainedPrompts, options: ModelOptions, task: str | None
) -> tuple[int, int]:
    """Returns how many images there were, and how many of them broken."""
    from pipeline.data.names import printable
    from pipeline.prediction.model import TrainedModel

    check_task(arguments, prompts, task)
    images = [image for place in arguments.inputs for image in find_images(Path(place))]
    model = TrainedModel(prompts, options, arguments.device)
    num_broken = 0
    try:
        stream = open(arguments.output, "w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    except OSError as error:
        raise UserError(f"--output {arguments.output} cannot be written: {error.strerror}") from None
    writer = csv.writer(stream)
    writer.writerow(["path", "class", "probability", "error"])
    for done, (path, found) in enumerate(zip(images, model.predict_stream(images, task)), 1):
        probability = "" if found.error else f"{found.probability:.4f}"
        writer.writerow([printable(str(path)), found.label or "", probability, found.error])
        num_broken += bool(found.error)
        if sys.stderr.isatty():
            print(f"\r{done} of {len(images)} images", end="", file=sys.stderr)
    if arguments.output:
        stream.close()
    return len(images), num_broken


def predict_to_parquet(
    arguments: argparse.Namespace, prompts: TrainedPrompts, options: ModelOptions, task: str | None
) -> tuple[int, int]:
    """Returns how many images there were, and how many of them broken."""
    from pipeline.clip.load import towers_without_weights
    from pipeline.config import parse_config
    from pipeline.prediction.batch import find_batch_input, predict_batch, told_in_lines
    from pipeline.runtime.cluster import joined

    found = find_batch_input(arguments.inputs)
    if not found.is_parquet or task is not None:
        check_task(arguments, prompts, task)
    image_size = towers_without_weights(prompts.config.clip).image_size
    cluster = {"address": arguments.address, "cpus_per_training": arguments.cpus_per_worker}
    cluster["gpus_per_training"] = arguments.gpus_per_worker

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with joined(parse_config({"cluster": cluster}).cluster, say) as needs:
        on_rows = told_in_lines(say, LINE_EVERY_S)
        return predict_batch(prompts, options, task, found, arguments.output, needs, image_size, on_rows)


def check_task(arguments: argparse.Namespace, prompts: TrainedPrompts, task: str | None) -> None:
    if task not in prompts.words:
        raise UserError(f"--task {task}: {arguments.prompts} has the tasks {', '.join(prompts.words)}")


def find_images(folder: Path) -> list[Path]:
    from pipeline.data.find import IMAGE_SUFFIXES

    if folder.is_file():
        return [folder]
    images = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not images:
        raise UserError(f"no images in {folder}")
    return images


if __name__ == "__main__":
    sys.exit(main())
