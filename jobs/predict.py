#!/usr/bin/env python
"""Classify images with a trained model; needs its adapter and the CLIP weights.

    mmap-clip predict mmap-runs/runs/<run> photos/ --task ink_left
    mmap-clip predict mmap-runs/runs/<run> a.jpg https://example.org/b.jpg --output predictions.json
    mmap-clip predict s3://bucket/runs/<run> /data/photos --task ink_left --output predictions.parquet

Prints CSV with the columns path, task, label, probability, error, or writes it where --output says: .csv, .tsv, .json
and .jsonl (with all probabilities) in this process; .parquet or a folder with Ray Data, on this machine or a cluster,
for any number of images. Without --task each image gets the most probable prediction of all tasks. A broken image has
an error instead of a label; the exit status is then 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.command_line import Field, check_adapter_exists, check_task, importing, print_status, report_user_errors
from pipeline.config import Fraction, JobArguments, JobOptions, JobParser, Precision, parse_config
from pipeline.errors import UserError
from pipeline.runtime.ray_start import check_ray

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter
    from pipeline.prediction.options import ModelOptions

PROGRESS_INTERVAL_S = 10


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("run", "inputs")

    run: str = Field(
        description="A run directory or an adapter file (.safetensors), local or s3://, hf-hub:OWNER/NAME, or an "
        "MLflow URI (models:/...)."
    )
    inputs: tuple[str, ...] = Field(
        description="Images, folders of images (recursive) and URLs (http, https); for Parquet output also s3:// URIs, "
        "and .parquet files with encoded images (bytes, or Hugging Face's structs), optionally `path` and `task`, or "
        "folders of them."
    )
    task: str | None = Field(None, description="Task of the images; null: the most probable prediction of all tasks.")
    output: str = Field(
        "-",
        description="New file or folder: .csv, .tsv, .json, .jsonl, or a folder of Parquet files (.parquet, or no "
        "suffix); -: CSV to stdout.",
    )
    temperature: float | None = Field(None, description="Softmax temperature for calibration; null: as saved, else 1.")
    threshold: Fraction | None = Field(None, description="Confidence threshold; below it the label is null.")
    device: str | None = Field(
        None, description="Torch device, except for Parquet output; null: cuda if available, else cpu."
    )
    precision: Precision | None = Field(
        None,
        description="Precision of the towers: float32, bfloat16 or auto (as clip.precision); null: as in training.",
    )


FIELD_HELP = {
    "clip.pretrained": "CLIP weights: an open_clip tag, a file, a folder or hf-hub:ORG/NAME; null: as in training.",
    "cluster.address": "Ray cluster to join, for Parquet output; null: RAY_ADDRESS, else a local Ray is started.",
    "cluster.num_cpus": "CPU cores of a local Ray; null: those that the job may use.",
    "cluster.gpus_per_worker": "GPUs per prediction worker, may be fractional; null: 1 if available, else 0.",
    "cluster.cpus_per_worker": "CPU cores per prediction worker; without GPUs also its threads; null: 1.",
}


REPLACED = dict.fromkeys(("adapter", "prompts"), "predict RUN INPUTS ..., without an option")


def main() -> int:
    with report_user_errors("rerun the same command to start over"):
        return predict(JobParser(__doc__, Options, FIELD_HELP, replacements=REPLACED).parse())


def predict(arguments: JobArguments[Options]) -> int:
    from pipeline.prediction.output_files import check_new_output, output_format

    job, fields = arguments.options, arguments.fields
    is_parquet = output_format(job.output) == "parquet"
    if not is_parquet and (cluster_fields := [name for name in fields if name.startswith("cluster.")]):
        raise UserError(f"--{cluster_fields[0]} has an effect on Parquet output only; use --output FOLDER.parquet")
    if is_parquet and job.device is not None:
        raise UserError("--device has no effect on Parquet output; use --cluster.gpus_per_worker")
    check_new_output(job.output)
    if is_parquet:
        check_ray(parse_config(arguments.nested_fields()).cluster)
    images = [] if is_parquet else list_images(job.inputs)
    check_adapter_exists(job.run)
    with importing("PyTorch"):
        from pipeline.prediction.load import read_model

    adapter, options, _ = read_model(
        job.run, fields.get("clip.pretrained"), job.temperature, job.threshold, job.precision
    )
    tasks = list(adapter.class_names)
    if job.task is not None:
        check_task(job.task, tasks, job.run)
    task = job.task or (tasks[0] if len(tasks) == 1 else None)
    if task is None:
        print_status(f"no --task: an image without one gets the most probable prediction of {', '.join(tasks)}")
    if is_parquet:
        num_images, num_broken = predict_to_parquet(arguments, adapter, options, task)
    else:
        num_images, num_broken = len(images), predict_to_text(job, images, adapter, options, task)
    if num_broken:
        print_status(f"{num_broken} of {num_images} images are broken; see the column `error`")
    return 1 if num_broken else 0


def predict_to_text(
    job: Options, images: Sequence[str], adapter: TrainedAdapter, options: ModelOptions, task: str | None
) -> int:
    """Return the number of broken images."""
    from pipeline.prediction.model import TrainedModel
    from pipeline.prediction.output_files import STDOUT, prediction_writer

    num_broken = 0
    print_status("loading CLIP ...")
    model = TrainedModel(adapter, options, job.device)
    with prediction_writer(job.output) as write:
        for count, prediction in enumerate(model.predict_stream(images, task), 1):
            write(prediction)
            num_broken += bool(prediction.error)
            if sys.stderr.isatty() and not (job.output == STDOUT and sys.stdout.isatty()):
                print(f"\r{count} of {len(images)} images", end="\n" * (count == len(images)), file=sys.stderr)
    return num_broken


def predict_to_parquet(
    arguments: JobArguments[Options], adapter: TrainedAdapter, options: ModelOptions, task: str | None
) -> tuple[int, int]:
    """Return the numbers of images and of broken images."""
    from pipeline.clip.load import build_meta_towers, fetch_weights
    from pipeline.data.walk import skipped_note
    from pipeline.prediction.batch import find_batch_input, predict_batch, progress_lines
    from pipeline.runtime.cluster import ray_connection

    batch_input, output = find_batch_input(arguments.options.inputs), arguments.options.output
    if batch_input.skipped:
        print_status(skipped_note(batch_input.skipped))
    clip = adapter.config.clip.with_weights(options.pretrained)
    fetch_weights(clip, print_status)
    preprocessing = build_meta_towers(clip).preprocessing
    with ray_connection(parse_config(arguments.nested_fields()).cluster, print_status) as worker_resources:
        on_progress = progress_lines(print_status, PROGRESS_INTERVAL_S)
        return predict_batch(adapter, options, task, batch_input, output, worker_resources, preprocessing, on_progress)


def list_images(inputs: Sequence[str]) -> list[str]:
    """List the URLs and the images among files and folders, and report which other files are not read.

    Raises:
        UserError: there is no such file, no image in a folder, or an input for Parquet output only.
    """
    from pipeline.data.walk import find_images, skipped_note
    from pipeline.files import is_uri
    from pipeline.prediction.encoded_images import is_url

    images: list[str] = []
    for name in inputs:
        if is_url(name):
            images.append(name)
            continue
        if is_uri(name) or name.lower().endswith(".parquet"):
            raise UserError(f"{name} is an input for Parquet output only: add --output FOLDER.parquet")
        files, skipped = find_images(name)
        if not files:
            raise UserError(f"no images in {name}{f'; {skipped_note(skipped)}' if skipped else ''}")
        if skipped:
            print_status(f"{name}: {skipped_note(skipped)}")
        images += files
    return images


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader, such as `head`, needs no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
