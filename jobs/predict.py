#!/usr/bin/env python
"""Classify images with a trained adapter; needs its file and the CLIP weights.

    python jobs/predict.py mmap-runs/runs/<run> photos/ --task ink
    python jobs/predict.py s3://bucket/runs/<run> /data/photos --task ink --output predictions.parquet

Without --output, or with one that ends in .csv: CSV with the columns path, class, probability, error, computed in this
process. With any other --output: a new folder of Parquet files with path, task, label, probability, error, computed by
Ray Data on this machine or a cluster, for any number of images. A broken image has an error instead of a class; the
exit status is then 1.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.command_line import Field, check_adapter_exists, importing, print_status, report_user_errors
from pipeline.config import Fraction, JobArguments, JobOptions, JobParser, parse_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter
    from pipeline.prediction.options import ModelOptions

PROGRESS_INTERVAL_S = 10


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("run", "inputs")

    run: str = Field(
        description="A run directory or an adapter file (.safetensors), local or s3://, or an MLflow URI (models:/...)."
    )
    inputs: tuple[str, ...] = Field(
        description="Images, or folders of images (recursive); for Parquet output also .parquet files with a column "
        "`image` of encoded bytes, optionally `path` and `task`, folders of them, and s3:// URIs."
    )
    task: str | None = Field(None, description="Task of the images; may be omitted if the adapter has only one.")
    output: str | None = Field(None, description="CSV file or Parquet folder to write; null: CSV to stdout.")
    temperature: float | None = Field(None, description="Softmax temperature for calibration; null: as saved, else 1.")
    threshold: Fraction | None = Field(None, description="Confidence threshold; below it the label is null.")
    device: str | None = Field(None, description="Torch device, for CSV output; null: cuda if available, else cpu.")


FIELD_HELP = {
    "clip.pretrained": "CLIP weights: an open_clip tag, a file, a folder or hf-hub:ORG/NAME; null: as in training.",
    "cluster.address": "Ray cluster to join, for Parquet output; null: RAY_ADDRESS, else a local Ray is started.",
    "cluster.gpus_per_worker": "GPUs per prediction worker, may be fractional; null: 1 if available, else 0.",
    "cluster.cpus_per_worker": "CPU cores per prediction worker; without GPUs also its threads; null: 1.",
}


REPLACED = dict.fromkeys(("adapter", "prompts"), "predict RUN INPUTS ..., without an option")


def main() -> int:
    with report_user_errors("rerun the same command to start over"):
        return predict(JobParser(__doc__, Options, FIELD_HELP, replacements=REPLACED).parse())


def predict(arguments: JobArguments[Options]) -> int:
    job, fields = arguments.options, arguments.fields
    csv_output = job.output is None or job.output.endswith(".csv")
    if csv_output and (cluster_fields := [name for name in fields if name.startswith("cluster.")]):
        raise UserError(f"--{cluster_fields[0]} has no effect on CSV output; use --output FOLDER.parquet")
    if not csv_output and job.device is not None:
        raise UserError("--device has no effect on Parquet output; use --cluster.gpus_per_worker")

    check_adapter_exists(job.run)
    with importing("PyTorch"):
        from pipeline.prediction.load import read_model

    adapter, options, _ = read_model(job.run, fields.get("clip.pretrained"), job.temperature, job.threshold)
    tasks = list(adapter.class_names)
    task = job.task or (tasks[0] if len(tasks) == 1 else None)
    if job.output is None or csv_output:
        num_images, num_broken = predict_to_csv(job, adapter, options, task)
    else:
        num_images, num_broken = predict_to_parquet(arguments, job.output, adapter, options, task)
    if num_broken:
        print_status(f"{num_broken} of {num_images} images are broken; see the column `error`")
    return 1 if num_broken else 0


def predict_to_csv(job: Options, adapter: TrainedAdapter, options: ModelOptions, task: str | None) -> tuple[int, int]:
    """Return the numbers of images and of broken images."""
    from pipeline.data.names import escape_for_terminal
    from pipeline.prediction.model import TrainedModel

    check_task(job, adapter, task)
    images = list_images(job.inputs)
    print_status("loading CLIP ...")
    model = TrainedModel(adapter, options, job.device)
    num_broken = 0
    try:
        stream = open(job.output, "w", newline="", encoding="utf-8") if job.output else sys.stdout
    except OSError as error:
        raise UserError(f"cannot write --output {job.output}: {error.strerror}") from None
    writer = csv.writer(stream)
    writer.writerow(["path", "class", "probability", "error"])
    for count, (path, prediction) in enumerate(zip(images, model.predict_stream(images, task)), 1):
        probability = "" if prediction.error else f"{prediction.probability:.4f}"
        writer.writerow([escape_for_terminal(str(path)), prediction.label or "", probability, prediction.error])
        num_broken += bool(prediction.error)
        if sys.stderr.isatty():
            print(f"\r{count} of {len(images)} images", end="", file=sys.stderr)
    if job.output:
        stream.close()
    return len(images), num_broken


def predict_to_parquet(
    arguments: JobArguments[Options], output: str, adapter: TrainedAdapter, options: ModelOptions, task: str | None
) -> tuple[int, int]:
    """Return the numbers of images and of broken images."""
    from pipeline.clip.load import build_meta_towers
    from pipeline.data.walk import skipped_note
    from pipeline.prediction.batch import find_batch_input, predict_batch, progress_lines
    from pipeline.runtime.cluster import ray_connection

    batch_input = find_batch_input(arguments.options.inputs)
    if batch_input.skipped:
        print_status(skipped_note(batch_input.skipped))
    if not batch_input.is_parquet or task is not None:
        check_task(arguments.options, adapter, task)
    preprocessing = build_meta_towers(adapter.config.clip.with_weights(options.pretrained)).preprocessing
    with ray_connection(parse_config(arguments.nested_fields()).cluster, print_status) as worker_resources:
        on_progress = progress_lines(print_status, PROGRESS_INTERVAL_S)
        return predict_batch(adapter, options, task, batch_input, output, worker_resources, preprocessing, on_progress)


def check_task(job: Options, adapter: TrainedAdapter, task: str | None) -> None:
    if task not in adapter.class_names:
        problem = "--task is missing" if task is None else f"unknown --task {task}"
        raise UserError(f"{problem}; {job.run} has the tasks {', '.join(adapter.class_names)}")


def list_images(inputs: Sequence[str]) -> list[Path]:
    """List the images among files and folders, and report which other files are not read."""
    from pipeline.data.walk import find_images, skipped_note

    images: list[Path] = []
    for path in inputs:
        files, skipped = find_images(path)
        if not files:
            raise UserError(f"no images in {path}{f'; {skipped_note(skipped)}' if skipped else ''}")
        if skipped:
            print_status(f"{path}: {skipped_note(skipped)}")
        images += map(Path, files)
    return images


if __name__ == "__main__":
    sys.exit(main())
