"""Read images by their paths below data.root: files, and rows of Parquet files, with paths `<file>#<row>`.

Rows are streamed from a row group, which is never in memory as a whole. Reading rows in order of their paths takes one
pass; going back restarts the row group.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.buckets import AnyPath
from pipeline.data.images import MAX_BYTES, BrokenImage, read_image

ROW_PATH = re.compile(r"(.+\.parquet)#(\d{8})", re.IGNORECASE | re.DOTALL)
_cache = threading.local()
"""Table that this thread read last."""


def row_path(file: str, row: int) -> str:
    """Return the path of an image in a Parquet file; paths sort in the order of the rows."""
    return f"{file}#{row:08d}"


@dataclass(frozen=True)
class ImageColumn:
    column: str
    name: str
    """Of what is read: the column, or its field `<column>.bytes` or `<column>.path`."""
    is_embedded: bool
    """False: a struct that has only paths of files."""


def find_image_column(schema: pa.Schema, metadata: pq.FileMetaData | None = None) -> ImageColumn | None:
    """Return the image column: `image`, else the only column of bytes or of structs with bytes or paths, as Hugging
    Face's datasets library writes them. None: there is none.

    Args:
        metadata: of the file; None: a struct with a field of bytes is assumed to have some.

    Raises:
        ValueError: several may be meant.
    """
    candidates: dict[str, ImageColumn] = {}
    for column in schema:
        name, dtype = column.name, column.type
        if _is_binary(dtype):
            candidates[name] = ImageColumn(name, name, True)
        elif (
            pa.types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0 and _is_binary(dtype.field("bytes").type)
        ):
            is_empty = metadata is not None and _has_only_nulls(metadata, f"{name}.bytes")
            has_paths = is_empty and dtype.get_field_index("path") >= 0
            candidates[name] = ImageColumn(name, f"{name}.{'path' if has_paths else 'bytes'}", not has_paths)
        elif pa.types.is_struct(dtype) and dtype.get_field_index("path") >= 0:
            candidates[name] = ImageColumn(name, f"{name}.path", False)
    if len(candidates) > 1 and "image" not in candidates:
        raise ValueError(f"the columns {', '.join(candidates)} have images: name the one to use `image`")
    return candidates.get("image", next(iter(candidates.values()), None))


def _is_binary(dtype: pa.DataType) -> bool:
    return any(test(dtype) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _has_only_nulls(metadata: pq.FileMetaData, name: str) -> bool:
    columns = [
        group.column(number)
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for number in range(group.num_columns)
        if group.column(number).path_in_schema == name
    ]
    return bool(columns) and all(
        column.statistics is not None
        and column.statistics.has_null_count
        and column.statistics.null_count == column.num_values
        for column in columns
    )


def open_table(file: AnyPath, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file, with options of pq.ParquetFile."""
    return pq.ParquetFile(file if isinstance(file, Path) else file.open(), **options)


def read_image_bytes(root: AnyPath, path: str) -> bytes:
    """Read the bytes of an indexed image.

    Raises:
        BrokenImage: no such file or row, an empty row, or more than images.MAX_BYTES.
        OSError: the file cannot be read.
    """
    match = ROW_PATH.fullmatch(path)
    if not match:
        return read_image(root / path)
    file, row = root / match[1], int(match[2])
    try:
        key: tuple[object, ...] = (str(file), id(root))
        if isinstance(file, Path):  # in a bucket, asking for each row would take longer than reading it
            status = file.stat()
            key = (str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if getattr(_cache, "key", None) != key:
            _cache.key, _cache.table = None, _Table(file)
            _cache.key, _cache.root = key, root  # which keeps its id
        table: _Table = _cache.table
        return table.read(row)
    except FileNotFoundError:
        raise BrokenImage("no such file") from None
    except BrokenImage:
        raise
    except (pa.ArrowException, LookupError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BrokenImage(f"the table cannot be read: {str(error).strip():.200}") from None


class _Table:
    def __init__(self, file: AnyPath):
        self._file = open_table(file, buffer_size=1 << 20)
        column = find_image_column(self._file.schema_arrow)
        if column is None:
            raise LookupError("no image column")
        self._column = column.name
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._group = -1
        self._next_row = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._error_by_group: dict[int, tuple[int, BaseException]] = {}
        """Row group → the first unreadable row and its error, which applies to all later rows."""

    def read(self, row: int) -> bytes:
        if row >= self._starts[-1]:
            raise BrokenImage("no such row")
        group = bisect_right(self._starts, row) - 1
        unreadable_row, reason = self._error_by_group.get(group, (row + 1, None))
        if row >= unreadable_row and reason:
            raise reason
        try:
            return self._read(group, row)
        except BrokenImage:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            self._error_by_group[group] = row, error
            raise

    def _read(self, group: int, row: int) -> bytes:
        if group != self._group or row < self._next_row:
            self._group, self._next_row = group, self._starts[group]
            # One row per batch: images may be large, and skipped ones are not kept.
            self._batches = self._file.iter_batches(1, row_groups=[group], columns=[self._column])
        while True:
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid("the row group is truncated")
            self._next_row += 1
            if self._next_row > row:
                break
        value = batch.column(0)[0]
        if isinstance(value, pa.StructScalar) and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            raise BrokenImage("the row has no image bytes")
        data: bytes = value.as_py()
        if len(data) > MAX_BYTES:
            raise BrokenImage(f"image too large ({len(data):,} bytes, limit {MAX_BYTES:,})")
        return data
