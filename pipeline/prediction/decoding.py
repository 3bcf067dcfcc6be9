"""The half of batch prediction that reads and decodes images, without torch: its many processes start sooner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.images import MAX_BYTES, BrokenImage, evaluation_pixels, read_image
from pipeline.data.names import escape_for_terminal
from pipeline.errors import escape_controls
from pipeline.runtime.storage import open_bucket

READING_THREADS = 4


def decoded(
    rows: pa.Table, uri: str | None, task: str | None, tasks: Sequence[str], image_size: int
) -> dict[str, np.ndarray]:
    """Of rows with `file`, or with `image` and perhaps `path` and `task`: path, task, pixels, error.

    Args:
        uri: of the bucket that the files are in, if they are in one.
        task: of rows that have none of their own.
        tasks: of the model.
    """
    count = len(rows)
    pixels = np.zeros((count, 3, image_size, image_size), np.uint8)
    of_rows = [task] * count
    if "file" in rows.column_names:
        names = [os.fsdecode(file) for file in rows["file"].to_pylist()]
        filesystem = open_bucket(uri)[0] if uri else None
        sources: Sequence[Any] = [(lambda name=name: _file_bytes(name, filesystem)) for name in names]
        paths: list[str | None] = [escape_for_terminal(name) for name in names]
    else:
        sources = [(lambda image=image: image) for image in rows["image"].to_pylist()]
        paths = rows["path"].to_pylist() if "path" in rows.column_names else [None] * count
        paths = [None if path is None else escape_for_terminal(str(path)) for path in paths]
        if "task" in rows.column_names:
            of_rows = [name or task for name in rows["task"].to_pylist()]

    def decode(at: int) -> str:
        if of_rows[at] not in tasks:
            return f"task {of_rows[at]!r} is none of the model's: {', '.join(tasks)}"
        try:
            if not (data := sources[at]()):
                raise BrokenImage("no bytes")
            pixels[at] = evaluation_pixels(data, image_size)
            return ""
        except (BrokenImage, OSError) as error:
            return escape_controls(str(error)) or type(error).__name__

    with ThreadPoolExecutor(READING_THREADS) as threads:
        errors = list(threads.map(decode, range(count)))
    columns = {"path": paths, "task": of_rows, "error": errors}
    return {"pixels": pixels, **{name: np.array(values, dtype=object) for name, values in columns.items()}}


def _file_bytes(name: str, filesystem: pafs.FileSystem | None) -> bytes:
    if filesystem is None:
        return read_image(Path(name))
    with filesystem.open_input_file(name) as stream:
        if (size := stream.size()) > MAX_BYTES:
            raise BrokenImage(f"{size:,} bytes are more than {MAX_BYTES:,}")
        data: bytes = stream.read()
        return data
