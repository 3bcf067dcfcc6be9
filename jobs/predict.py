#!/usr/bin/env python
"""Classifies images with trained prompts; needs the prompts file and the CLIP weights.

    python jobs/predict.py --adapter mmap-runs/runs/<run>/adapters/grouped.safetensors --task ink photos/
    python jobs/predict.py --adapter s3://bucket/runs/<run> --task ink /data/photos --output predictions.parquet

Without --output, or with one that ends in .csv: a table of path, class, probability, error, made by this process.
With any other --output: a new folder of Parquet files of path, task, label, probability, error, made by Ray Data on
this machine or a cluster, of any number of images. A broken image gets an error instead of a class, and exit status 1.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline.command_line import report_user_errors, say
from pipeline.config import Fraction, Given, JobOptions, JobParser, parse_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter
    from pipeline.prediction.options import ModelOptions

LINE_EVERY_S = 10


class Options(JobOptions):
    positional: ClassVar[str] = "inputs"

    inputs: tuple[str, ...] = Field(
        description="A folder of images, searched at all depths, or an image; for Parquet output also .parquet files "
        "with a column image of bytes and perhaps path and task, folders of these, and any of them in a bucket "
        "(s3://...)."
    )
    prompts: str = Field(
        description="prompts/*.safetensors of a run, its folder, either in a bucket, or models:/... of MLflow."
    )
    task: str | None = Field(None, description="Task whose prompts to use; may be left out if there is one only.")
    output: str | None = Field(None, description="Where to write; null: to the standard output, as CSV.")
    temperature: float | None = Field(None, description="What logits are divided by; null: as saved, else 1.")
    threshold: Fraction | None = Field(None, description="Probability below which an image is none of the classes.")
    device: str | None = Field(None, description="For CSV output; null: cuda if there, else cpu.")


TAKES = {
    "clip.pretrained": "Tag or file of the CLIP weights; null: where they lay in training.",
    "cluster.address": "For Parquet output: Ray cluster to join; null: RAY_ADDRESS, else a local Ray is started.",
    "cluster.gpus_per_worker": "GPUs of a worker that predicts, or a fraction; null: 1 if there are any.",
    "cluster.cpus_per_worker": "CPU cores of a worker that predicts, without GPUs also its threads; null: 1.",
}


def main() -> int:
    with report_user_errors("the same command begins anew"):
        return predict(JobParser(__doc__, Options, TAKES).given())


def predict(given: Given[Options]) -> int:
    own = given.own
    to_csv = own.output is None or own.output.endswith(".csv")
    if to_csv and (of_ray := [name for name in given.fields if name.startswith("cluster.")]):
        raise UserError(f"--{of_ray[0]} means nothing for CSV output: see --output <folder>.parquet")
    if not to_csv and own.device is not None:
        raise UserError("--device means nothing for Parquet output: see --cluster.gpus_per_worker")

    from pipeline.prediction.load import read_model  # torch takes seconds to import

    prompts, options, _ = read_model(own.prompts, given.fields.get("clip.pretrained"), own.temperature, own.threshold)
    tasks = list(prompts.class_names)
    task = own.task or (tasks[0] if len(tasks) == 1 else None)
    if own.output is None or to_csv:
        count, num_broken = predict_to_csv(own, prompts, options, task)
    else:
        count, num_broken = predict_to_parquet(given, own.output, prompts, options, task)
    if num_broken:
        say(f"{num_broken} of {count} images are broken; see the column error")
    return 1 if num_broken else 0


def predict_to_csv(own: Options, prompts: TrainedAdapter, options: ModelOptions, task: str | None) -> tuple[int, int]:
    """Returns how many images there were, and how many of them broken."""
    from pipeline.data.names import escape_for_terminal
    from pipeline.prediction.model import TrainedModel

    check_task(own, prompts, task)
    images = [image for place in own.inputs for image in find_images(Path(place))]
    model = TrainedModel(prompts, options, own.device)
    num_broken = 0
    try:
        stream = open(own.output, "w", newline="", encoding="utf-8") if own.output else sys.stdout
    except OSError as error:
        raise UserError(f"--output {own.output} cannot be written: {error.strerror}") from None
    writer = csv.writer(stream)
    writer.writerow(["path", "class", "probability", "error"])
    for done, (path, found) in enumerate(zip(images, model.predict_stream(images, task)), 1):
        probability = "" if found.error else f"{found.probability:.4f}"
        writer.writerow([escape_for_terminal(str(path)), found.label or "", probability, found.error])
        num_broken += bool(found.error)
        if sys.stderr.isatty():
            print(f"\r{done} of {len(images)} images", end="", file=sys.stderr)
    if own.output:
        stream.close()
    return len(images), num_broken


def predict_to_parquet(
    given: Given[Options], output: str, prompts: TrainedAdapter, options: ModelOptions, task: str | None
) -> tuple[int, int]:
    """Returns how many images there were, and how many of them broken."""
    from pipeline.clip.load import build_meta_towers
    from pipeline.prediction.batch import find_batch_input, predict_batch, progress_lines
    from pipeline.runtime.cluster import ray_connection

    found = find_batch_input(given.own.inputs)
    if not found.is_parquet or task is not None:
        check_task(given.own, prompts, task)
    image_size = build_meta_towers(prompts.config.clip).image_size
    with ray_connection(parse_config(given.nested()).cluster, say) as worker_resources:
        on_rows = progress_lines(say, LINE_EVERY_S)
        return predict_batch(prompts, options, task, found, output, worker_resources, image_size, on_rows)


def check_task(own: Options, prompts: TrainedAdapter, task: str | None) -> None:
    if task not in prompts.class_names:
        raise UserError(f"--task {task}: {own.prompts} has the tasks {', '.join(prompts.class_names)}")


def find_images(folder: Path) -> list[Path]:
    from pipeline.data.index import IMAGE_SUFFIXES

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
