#!/usr/bin/env python
"""Export a trained model to files that are used without this package: ONNX, torch.export, or weights for open_clip.

    mmap-clip export mmap-runs/runs/<run> --task ink_left --output ink_left.onnx
    mmap-clip export mmap-runs/runs/<run>/adapters/coop.safetensors --task ink_left --output ink_left.pt2
    mmap-clip export mmap-runs/runs/<run>/adapters/clip_lora.safetensors --task ink_left --output merged/

ONNX and torch.export have one task: they take preprocessed pixels, uint8 (N, 3, S, S), and give logits and
probabilities (N, C); the metadata has the classes and the preprocessing. A folder has a whole CLIP for open_clip with
the trained weights merged. Each is compared with the model before it appears. docs/export.md shows how to use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.command_line import Field, check_adapter_exists, check_task, importing, print_status, report_user_errors
from pipeline.config import Fraction, JobArguments, JobOptions, JobParser
from pipeline.errors import UserError
from pipeline.files import is_uri
from pipeline.methods.registry import METHODS

if TYPE_CHECKING:
    from pipeline.methods.adapter_file import TrainedAdapter


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str = Field(
        description="A run directory or an adapter file (.safetensors), local or s3://, hf-hub:OWNER/NAME, or an "
        "MLflow URI (models:/...)."
    )
    output: str = Field(
        description="New file or folder: .onnx (ONNX), .pt2 (torch.export), or a folder of weights for open_clip."
    )
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
    check_format(job)
    check_new_output(job.output)
    check_adapter_exists(job.run)
    with importing("PyTorch"):
        from pipeline.prediction.export import check_onnx_packages, export_open_clip, export_task
        from pipeline.prediction.load import read_model

    output = Path(job.output).expanduser()
    if output.suffix == ".onnx":
        check_onnx_packages()
    adapter, options, _ = read_model(job.run, arguments.fields.get("clip.pretrained"), job.temperature, job.threshold)
    task = find_task(job, adapter, is_merged=not output.suffix)
    print_status("loading CLIP, then exporting it ...")
    if output.suffix:
        difference, kind = export_task(adapter, options, task, output), "probabilities"
    else:
        difference, kind = export_open_clip(adapter, options, task, output), "image features"
    print_status(f"{kind} differ from the model's by at most {difference:.1g}")
    print(output)


def check_format(job: Options) -> None:
    """Raises: UserError: another suffix, a bucket, or options that have no effect."""
    if is_uri(job.output):
        raise UserError(f"--output {job.output}: give a local path, and copy the file to the bucket")
    if (suffix := Path(job.output).suffix) not in (".onnx", ".pt2", ""):
        raise UserError(
            f"--output {job.output}: unknown suffix {suffix}; use .onnx, .pt2, or a folder without a suffix"
        )
    for name in ("temperature", "threshold"):
        if not suffix and getattr(job, name) is not None:
            raise UserError(f"--{name} has no effect on weights for open_clip; use --output FILE.onnx or FILE.pt2")


def find_task(job: Options, adapter: TrainedAdapter, is_merged: bool) -> str:
    """Return the task to export, or any of the only group for merged weights.

    Raises:
        UserError: there is no such task, or several; the method's parameters cannot be merged into weights.
    """
    method, tasks = METHODS[adapter.method], list(adapter.class_names)
    if is_merged and not method.exports_weights:
        titles = ", ".join(kind.title for kind in METHODS.values() if kind.exports_weights)
        raise UserError(
            f"--output {job.output}: {method.title} cannot be merged into the weights of CLIP (only {titles}); use "
            "--output FILE.onnx or FILE.pt2"
        )
    if job.task is not None:
        check_task(job.task, tasks, job.run)
    elif len(adapter.groups if is_merged else tasks) > 1:
        raise UserError(f"--task is required: {job.run} has the tasks {', '.join(tasks)}")
    return job.task or tasks[0]


if __name__ == "__main__":
    main()
