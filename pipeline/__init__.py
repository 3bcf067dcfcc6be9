"""Adaptation of a frozen CLIP to several related image-classification tasks with grouped MmAP prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.prediction.model import TrainedModel


def load(
    source: str | os.PathLike[str],
    *,
    device: str | None = None,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> TrainedModel:
    """Load a trained model to classify images with (docs/prediction.md). Only safetensors and JSON are read.

    Args:
        source: an adapter file, a run directory (its adapters/grouped.safetensors), either of them in a bucket
            (s3://...), or a model or file in MLflow (models:/name/version, models:/name@alias, runs:/id/...).
        device: torch device; None: a GPU if available, else the CPU.
        pretrained: path or open_clip tag of the CLIP weights, if different from training.
        temperature: softmax temperature for calibration, of all tasks or by task; None: as saved with the adapter by
            `TrainedModel.save_options`, else 1.
        threshold: confidence threshold, 0 to 1, below which the label is None; None: as saved, else 0.

    Raises:
        UserError: no such source, not an adapter file, another CLIP, or a value out of range.
    """
    from pipeline.prediction.load import load_model  # torch takes seconds to import

    return load_model(source, device, pretrained, temperature, threshold)
