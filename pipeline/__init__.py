"""Adapts a frozen CLIP to several related image-classification tasks with grouped MmAP prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.prediction.model import TrainedModel


def load(
    place: str | os.PathLike[str],
    *,
    device: str | None = None,
    pretrained: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> TrainedModel:
    """The model that a run made, to classify images with (docs/prediction.md). Only safetensors and JSON are read.

    Args:
        place: a prompts file, a run's folder (its prompts/grouped.safetensors), either of these in a bucket
            (s3://...), or a model or file in MLflow (models:/name/version, models:/name@alias, runs:/id/...).
        device: torch's name of it; None: a GPU if there is one.
        pretrained: where the CLIP weights are here, if not where they were in training.
        temperature: what logits are divided by, for all tasks, or by task; None: what was saved with the prompts by
            `TrainedModel.save_options`, else 1.
        threshold: probability, 0 to 1, below which an image is none of the classes; None: what was saved, else 0.

    Raises:
        UserError: no such place, no prompts of this project, another CLIP, a value out of range.
    """
    from pipeline.prediction.load import load_model  # torch takes seconds to import

    return load_model(place, device, pretrained, temperature, threshold)
