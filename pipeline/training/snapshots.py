"""Snapshots of the global prompt's training on disk: per-task gradients, and the trajectory of its parameters.

Columns of gradients, one Parquet row per step and task: step, epoch (from 1), task, loss, gradient (float32 vector),
layer_norms (float32, the gradient's norm per layer; one entry for a source prompt shared by all layers). The schema
metadata `layout` holds the vector's parts: name → shape, in order. Columns of the trajectory, one row per step: step,
epoch, and point, the parameters (float32 vector of the same layout) at which gradients of new tasks are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import UserError
from pipeline.files import read_parquet
from pipeline.training.trainer import Snapshot

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("epoch", pa.int64()),
        pa.field("task", pa.string()),
        pa.field("loss", pa.float64()),
        pa.field("gradient", pa.list_(pa.float32())),
        pa.field("layer_norms", pa.list_(pa.float32())),
    ]
)
TRAJECTORY_SCHEMA = pa.schema(
    [pa.field("step", pa.int64()), pa.field("epoch", pa.int64()), pa.field("point", pa.list_(pa.float32()))]
)


def write_snapshots(
    path: Path, tasks: Sequence[str], snapshots: Iterable[Snapshot], layout: dict[str, list[int]]
) -> None:
    """Write the tasks' gradients, with the layout of `SharedMmap.gradient_layout`."""
    schema = SCHEMA.with_metadata({"layout": json.dumps(layout), "tasks": json.dumps(list(tasks))})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for snapshot in snapshots:
            record = snapshot.record
            rows = [
                {
                    "step": record.step,
                    "epoch": record.epoch,
                    "task": task,
                    "loss": loss,
                    "gradient": gradient.numpy(),
                    "layer_norms": layer_norms(gradient, layout).numpy(),
                }
                for task, loss, gradient in zip(tasks, record.losses, snapshot.gradients)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def write_trajectory(path: Path, snapshots: Iterable[Snapshot]) -> None:
    """Write the parameters at which the snapshots were taken."""
    rows = [{"step": s.record.step, "epoch": s.record.epoch, "point": s.parameters.numpy()} for s in snapshots]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA), path, compression="zstd")


def read_trajectory(path: Path) -> list[tuple[int, int, torch.Tensor]]:
    """Return (step, epoch, parameters (P,) float32) of each snapshot, sorted by step.

    Raises:
        UserError: the file is missing or damaged.
    """
    columns = _read(path, TRAJECTORY_SCHEMA.names, TRAJECTORY_SCHEMA).to_pydict()
    return sorted(
        ((step, epoch, torch.tensor(point)) for step, epoch, point in zip(*columns.values())), key=lambda row: row[0]
    )


def layer_norms(gradient: torch.Tensor, layout: dict[str, list[int]]) -> torch.Tensor:
    """Return the norm (K,) of a gradient vector (P,) per layer, over all parameters that have K layers."""
    depth = max(shape[0] for shape in layout.values())
    squares = torch.zeros(depth, dtype=torch.float64)
    parts = gradient.double().split([math.prod(shape) for shape in layout.values()])
    for part, shape in zip(parts, layout.values()):
        if shape[0] == depth:
            squares += part.view(depth, -1).square().sum(1)
    return squares.sqrt().float()


def read_gradients(path: Path, tasks: Sequence[str]) -> np.ndarray:
    """Return gradients (S, T, P), float64, sorted by step, with the tasks in the given order.

    Raises:
        UserError: the file is missing or damaged, or a step lacks a task.
    """
    table = _read(path, ["step", "task", "gradient"])
    gradients_by_step: dict[int, dict[str, np.ndarray]] = {}
    for step, task, gradient in zip(
        table["step"].to_pylist(), table["task"].to_pylist(), table["gradient"].to_numpy(zero_copy_only=False)
    ):
        gradients_by_step.setdefault(step, {})[task] = gradient
    for step, task_gradients in gradients_by_step.items():
        if missing := [task for task in tasks if task not in task_gradients]:
            raise UserError(f"{path}: the snapshot of step {step} lacks the tasks {', '.join(missing)}")
    gradients = [[task_gradients[task] for task in tasks] for _, task_gradients in sorted(gradients_by_step.items())]
    if len({gradient.shape for step_gradients in gradients for gradient in step_gradients}) > 1:
        raise UserError(f"{path} has gradients of several lengths: remove {path.parent} and train again")
    return np.stack(gradients).astype(np.float64)


def read_steps(path: Path) -> list[int]:
    """Return the steps (S,) of the snapshots, in the order of `read_gradients`."""
    return sorted(set(_read(path, ["step"])["step"].to_pylist()))


def _read(path: Path, columns: list[str], schema: pa.Schema = SCHEMA) -> pa.Table:
    if not path.is_file():
        raise UserError(
            f"{path}: no gradient snapshots; train the global prompt first with mmap-clip train-global-prompt"
        )
    try:
        table = read_parquet(path, columns)
        if table.schema.equals(pa.schema([schema.field(name) for name in columns])) and table.num_rows:
            if all(column.null_count == 0 for column in table.columns):
                return table
        reason = f"{table.num_rows} rows of {', '.join(f'{f.name}: {f.type}' for f in table.schema)}"
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read as gradient snapshots ({reason}): remove {path.parent} and train again")
