"""Losses of training images on disk, with image features of the frozen CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.errors import UserError
from pipeline.files import read_parquet
from pipeline.training.evaluate import AnyPrediction, MultiLabelPrediction

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("features", pa.list_(pa.float32())),
    ]
)

MULTI_LABEL_SCHEMA = SCHEMA.set(1, pa.field("label", pa.list_(pa.int64())))


@dataclass(frozen=True)
class TrainingLosses:
    """Losses of a task's N training images."""

    labels: np.ndarray
    """(N,); (N, C) of 0 and 1 if an image may have several, for C classes at least as many as occur."""
    losses: np.ndarray
    """(N,): in nats."""
    features: np.ndarray | None
    """(N, E), float64: features of the frozen image tower, if they were stored."""


def write_losses(path: Path, predictions: Sequence[AnyPrediction], features: Mapping[str, torch.Tensor] = {}) -> None:
    """Write a row per predicted image, task by task.

    Args:
        features: task → (N, E), of all tasks or of none.
    """
    values = [row for task_features in features.values() for row in task_features.float().numpy()]
    columns = {
        "task": [prediction.task for prediction in predictions],
        "label": [prediction.label for prediction in predictions],
        "loss": [prediction.loss for prediction in predictions],
        "features": values or [None] * len(predictions),
    }
    schema = MULTI_LABEL_SCHEMA if isinstance(predictions[0], MultiLabelPrediction) else SCHEMA
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def read_losses(path: Path) -> dict[str, TrainingLosses]:
    """Return task → its losses.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        table = read_parquet(path)
        if not table.schema.equals(SCHEMA) and not table.schema.equals(MULTI_LABEL_SCHEMA):
            raise ValueError(f"columns {table.schema.names}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as losses of training images ({error}): remove {path.parent} and run again"
        ) from None
    losses = {}
    for task in dict.fromkeys(table["task"].to_pylist()):
        rows = table.filter(pc.equal(table["task"], task))
        features = None if rows["features"].null_count else np.array(rows["features"].to_pylist(), np.float64)
        losses[task] = TrainingLosses(_labels(rows["label"]), rows["loss"].to_numpy(), features)
    return losses


def _labels(column: pa.ChunkedArray) -> np.ndarray:
    if column.type == pa.int64():
        labels: np.ndarray = column.to_numpy()
        return labels
    rows = column.to_pylist()
    has_label = np.zeros((len(rows), 1 + max(map(max, rows))), np.int64)
    for row, image_labels in zip(has_label, rows):
        row[image_labels] = 1
    return has_label
