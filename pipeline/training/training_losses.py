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
from pipeline.training.evaluate import Prediction

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("features", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class TrainingLosses:
    """Losses of a task's N training images."""

    labels: np.ndarray
    """(N,)."""
    losses: np.ndarray
    """(N,): cross-entropies in nats."""
    features: np.ndarray | None
    """(N, E), float64: features of the frozen image tower, if they were stored."""


def write_losses(path: Path, predictions: Sequence[Prediction], features: Mapping[str, torch.Tensor] = {}) -> None:
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
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def read_losses(path: Path) -> dict[str, TrainingLosses]:
    """Return task → its losses.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        table = read_parquet(path)
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"columns {table.schema.names}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as losses of training images ({error}): remove {path.parent} and run again"
        ) from None
    losses = {}
    for task in dict.fromkeys(table["task"].to_pylist()):
        rows = table.filter(pc.equal(table["task"], task))
        features = None if rows["features"].null_count else np.array(rows["features"].to_pylist(), np.float64)
        losses[task] = TrainingLosses(rows["label"].to_numpy(), rows["loss"].to_numpy(), features)
    return losses
