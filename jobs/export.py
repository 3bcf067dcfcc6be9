#!/usr/bin/env python
"""Export one task of a trained model to a file that runs without this package: ONNX, or torch.export.

    mmap-clip export mmap-runs/runs/<run> --task ink_left --output ink_left.onnx
    mmap-clip export mmap-runs/runs/<run>/adapters/coop.safetensors --task ink_left --output ink_left.pt2

The file takes preprocessed pixels, uint8 (N, 3, S, S), and gives logits and probabilities (N, C); its metadata has the
classes and the preprocessing. It is compared with the model before it appears. docs/export.md shows how to use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pipeline.command_line import Field, check_adapter_exists, check_task, importing, print_status, report_user_errors
from pipeline.config import Fraction, JobArguments, JobOptions, JobParser
from pipeline.errors import UserError
from pipeline.files import is_uri

SUFFIXES = (".onnx", ".pt2")


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str = Field(
        description="A run directory or an adapter file (.safetensors), local or s3://, or an MLflow URI (models:/...)."
    )
    output: str = Field(description="New file: .onnx (ONNX), or .pt2 (torch.export).")
    task: str | None = Field(None, description="Task to export; null: the only one.")
    temperature: float | None = Field(None, description="Softmax temperature; null: as saved, else 1.")
    threshold: Fraction | None = Field(None, description="Confidence threshold in the metadata; null: as saved.")


FIELD_HELP = {
    "clip.pretrained": "CLIP weights: an open_clip tag, a file, a folder or hf-hub:ORG/NAME; null: as in training.",
}


def main() -> None:
    with report_user_errors("rerun the same command to start over"):
        export(JobParser(__doc__, Options, FIELD_HELP).parse())


def export(arguments: JobArguments[Options]) -> None:
    from pipeline.prediction.output_files import check_new_output

    job = arguments.options
    check_format(job.output)
    check_new_output(job.output)
    output = Path(job.output).expanduser()
    check_adapter_exists(job.run)
    with importing("PyTorch"):
        from pipeline.prediction.export import check_onnx_packages, export_task
        from pipeline.prediction.load import read_model

    if output.suffix == ".onnx":
        check_onnx_packages()
    adapter, options, _ = read_model(job.run, arguments.fields.get("clip.pretrained"), job.temperature, job.threshold)
    tasks = list(adapter.class_names)
    if job.task is None and len(tasks) > 1:
        raise UserError(f"--task is required: {job.run} has the tasks {', '.join(tasks)}")
    task = job.task or tasks[0]
    check_task(task, tasks, job.run)
    print_status("loading CLIP, then tracing it ...")
    difference = export_task(adapter, options, task, output)
    print_status(
        f"{output.stat().st_size / 1e6:,.1f} MB; probabilities differ from the model's by up to {difference:.1g}"
    )
    print(output)


def check_format(output: str) -> None:
    """Raises: UserError: another suffix, or a bucket."""
    if is_uri(output):
        raise UserError(f"--output {output}: give a local path, and copy the file to the bucket")
    if (suffix := Path(output).suffix) not in SUFFIXES:
        raise UserError(f"--output {output}: unknown suffix {suffix!r}; use {' or '.join(SUFFIXES)}")


if __name__ == "__main__":
    main()
