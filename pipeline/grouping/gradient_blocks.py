"""Selection of the gradient values that an affinity is computed from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

SOURCE = "source"
"""Name of the source prompt in a layout; all other entries are scaling matrices."""


def read_layout(path: Path) -> dict[str, list[int]]:
    """Return name → shape of the parts of a snapshot file's gradient vectors, in order; axis 0 is the layer.

    Raises:
        UserError: the file is missing, damaged or without snapshots.
    """
    remedy = "train the global prompt again (mmap-clip train-global-prompt)"
    if not path.is_file():
        raise UserError(f"{path}: no gradient snapshots; {remedy}")
    try:
        num_rows, schema = pq.read_metadata(path).num_rows, pq.read_schema(path)
        layout: dict[str, list[int]] = json.loads((schema.metadata or {})[b"layout"])
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path} cannot be read as gradient snapshots ({error!r}); remove it and {remedy}") from None
    if num_rows == 0:
        raise UserError(f"{path} has no snapshots; {remedy} with a smaller global_prompt.snapshot_every")
    return layout


def gradient_blocks(
    layout: Mapping[str, Sequence[int]], *, per_layer: bool = False, scaling_matrices: bool = True
) -> list[np.ndarray]:
    """Return indices into a gradient vector (P,): one array, or one for each layer.

    Args:
        layout: from `read_layout`.
        per_layer: a block for each layer; a source prompt shared by all layers is a separate block.
        scaling_matrices: whether to include them beside the source prompt.
    """
    ends = np.cumsum([math.prod(shape) for shape in layout.values()])
    parts = {
        name: np.arange(end - math.prod(shape), end).reshape(shape[0], -1)  # (layers, values of a layer)
        for end, (name, shape) in zip(ends, layout.items())
        if scaling_matrices or name == SOURCE
    }
    if not per_layer:
        return [np.concatenate([part.ravel() for part in parts.values()])]
    depths = sorted({len(part) for part in parts.values()})
    return [
        np.concatenate([part[layer] for part in parts.values() if len(part) == depth])
        for depth in depths
        for layer in range(depth)
    ]
