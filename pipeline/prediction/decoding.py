"""Reading and decoding of images for batch prediction, without torch, so that its many processes start fast."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.buckets import open_bucket
from pipeline.data.images import MAX_BYTES, BrokenImage, evaluation_pixels, read_image
from pipeline.data.names import escape_for_terminal
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import escape_controls
from pipeline.prediction.encoded_images import is_missing, is_url, read_url

READING_THREADS = 4


def decode_rows(
    rows: pa.Table,
    uri: str | None,
    task: str | None,
    tasks: Sequence[str],
    preprocessing: Preprocessing,
    image_column: str = "image",
) -> dict[str, np.ndarray]:
    """Return path, task, pixels, error of rows with `file`, or with images and optionally `path` and `task`.

    Args:
        uri: bucket of the files; None: local files.
        task: task of rows without one; None: all tasks.
        tasks: tasks of the model.
        image_column: column of encoded images, or of structs with their `bytes` and optionally `path`.
    """
    num_rows, size = len(rows), preprocessing.image_size
    pixels = np.zeros((num_rows, 3, size, size), np.uint8)
    row_tasks = [task] * num_rows
    if "file" in rows.column_names:
        names = [os.fsdecode(file) for file in rows["file"].to_pylist()]
        filesystem = open_bucket(uri)[0] if uri else None
        readers: Sequence[Any] = [(lambda name=name: _read_file(name, filesystem)) for name in names]
        paths: list[str | None] = [escape_for_terminal(name) for name in names]
    else:
        images = rows[image_column].to_pylist()
        paths = [None] * num_rows
        if pa.types.is_struct(rows[image_column].type):
            paths = [image and image.get("path") for image in images]
            images = [image and image["bytes"] for image in images]
        readers = [(lambda image=image: image) for image in images]
        paths = rows["path"].to_pylist() if "path" in rows.column_names else paths
        paths = [None if is_missing(path) else escape_for_terminal(str(path)) for path in paths]
        if "task" in rows.column_names:
            row_tasks = [task if is_missing(name) else name for name in rows["task"].to_pylist()]

    def decode(row: int) -> str:
        if row_tasks[row] is not None and row_tasks[row] not in tasks:
            return f"unknown task {row_tasks[row]!r}; the model has the tasks {', '.join(tasks)}"
        try:
            if not (data := readers[row]()):
                raise BrokenImage("no bytes")
            pixels[row] = evaluation_pixels(data, preprocessing)
            return ""
        except (BrokenImage, OSError) as error:
            return escape_controls(str(error)) or type(error).__name__

    with ThreadPoolExecutor(READING_THREADS) as threads:
        errors = list(threads.map(decode, range(num_rows)))
    columns = {"path": paths, "task": [None if name is None else str(name) for name in row_tasks], "error": errors}
    return {"pixels": pixels, **{name: np.array(values, dtype=object) for name, values in columns.items()}}


def _read_file(name: str, filesystem: pafs.FileSystem | None) -> bytes:
    if is_url(name):
        return read_url(name)
    if filesystem is None:
        return read_image(Path(name))
    with filesystem.open_input_file(name) as stream:
        if (size := stream.size()) > MAX_BYTES:
            raise BrokenImage(f"{size:,} bytes exceed the limit of {MAX_BYTES:,}")
        data: bytes = stream.read()
        return data
