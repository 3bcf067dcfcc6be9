"""Adaptation of a frozen CLIP to several related image-classification tasks with grouped MmAP prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Precision
    from pipeline.data.findings import Finding
    from pipeline.prediction.model import TrainedModel
    from pipeline.workflows.fit import ConfigSource
    from pipeline.workflows.runs import Run

__all__ = ["UserError", "check", "fit", "load", "open_run", "runs"]


def fit(
    root: str | os.PathLike[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    shots: int | None = None,
    baselines: Sequence[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    name: str | None = None,
    storage: str | os.PathLike[str] | None = None,
    config: ConfigSource | None = None,
    until: str = "report",
    verbose: bool = True,
    **sections: Any,
) -> Run:
    """Run the pipeline, as `mmap-clip full-pipeline` does: check the images, sample few of them for training, group
    the tasks, train, evaluate, report (docs/python.md).

    The same settings give the same run as the command line, and work that is done is not repeated. Unless this
    process is connected to Ray, a local Ray is started, and stopped at the end.

    Args:
        root: images, <root>/<task>/<class>/*, or a table; None: that of `config`, else the built-in digits, with the
            recipe of the demo.
        tasks: tasks to use; None: all.
        shots: training images per class and task; all others are test images.
        baselines: methods to compare with, such as ["coop", "linear_probe"].
        model, pretrained: CLIP's architecture and weights, such as "ViT-B-32" and "openai", or a path.
        epochs, batch_size, learning_rate: of MmAP's training; the baselines have their own.
        seed: random seed of everything.
        name: name of the run in reports and MLflow.
        storage: root of all outputs, a folder or a bucket.
        config: YAML file or files, a mapping of fields, or a Config; the other arguments override it.
        until: last stage: data_check, splits, global_prompt, single_tasks, grouping, group_trainings or report.
        verbose: print progress and warnings.
        sections: all other settings (docs/configuration.md), by section: grouping={"objective": "mean"}.

    None stands for the value of `config`, else for the default.

    Raises:
        UserError: an unknown argument, an invalid value, or anything else that the user can fix, with the remedy.
    """
    from pipeline.workflows.fit import fit

    arguments = {
        "root": root,
        "tasks": tasks,
        "shots": shots,
        "baselines": baselines,
        "model": model,
        "pretrained": pretrained,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "name": name,
        "storage": storage,
        **sections,
    }
    return fit(arguments, config, until, verbose)


def check(
    root: str | os.PathLike[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    shots: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    config: ConfigSource | None = None,
    verbose: bool = True,
    **sections: Any,
) -> list[Finding]:
    """Check the images, as `mmap-clip check-data` does, and return the findings, errors first. Trains nothing.

    Arguments and errors are those of `fit`; a later `fit` does not read the images again.
    """
    from pipeline.workflows.fit import check

    arguments = {"root": root, "tasks": tasks, "shots": shots, "storage": storage, **sections}
    return check(arguments, config, verbose)


def open_run(source: str | os.PathLike[str]) -> Run:
    """Open an existing run, finished or not: the object that `fit` returned.

    Args:
        source: run directory, <storage>/runs/<run>; local or in a bucket (s3://...).

    Raises:
        UserError: there is no such run.
    """
    from pipeline.workflows.runs import open_run

    return open_run(source)


def runs(storage: str | os.PathLike[str] = "mmap-runs") -> list[Run]:
    """Return the runs of a storage, a folder or a bucket, the newest first; `mmap-clip runs` prints them as a table.

    Raises:
        UserError: there is no such storage.
    """
    from pipeline.workflows.runs import open_runs

    return open_runs(storage)


def load(
    source: str | os.PathLike[str],
    *,
    device: str | None = None,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
    precision: Precision | None = None,
) -> TrainedModel:
    """Load a trained model to classify images with (docs/prediction.md). Only safetensors and JSON are read.

    Args:
        source: an adapter file, a run directory (its adapters/grouped.safetensors), either of them in a bucket
            (s3://...), or a model or file in MLflow (models:/name/version, models:/name@alias, runs:/id/...).
        device: torch device; None: a GPU if available, else the CPU.
        pretrained: path or open_clip tag of the CLIP weights, if different from training.
        temperature: softmax temperature for calibration, of all tasks or by task; None: as saved with the adapter by
            `TrainedModel.save_options`, else 1.
        threshold: confidence threshold, 0 to 1, below which the label is None; None: as saved, else 0, or 0.5 for each
            label where images may have several.
        precision: of the towers: float32, bfloat16 or auto, as clip.precision; None: as saved, else as in training.

    Raises:
        UserError: no such source, not an adapter file, another CLIP, or a value out of range.
    """
    from pipeline.prediction.load import load_model  # torch takes seconds to import

    return load_model(source, device, pretrained, temperature, threshold, precision=precision)
