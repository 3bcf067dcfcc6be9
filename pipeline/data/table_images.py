"""Images by their paths below a data root: files, and rows of Parquet files, called `<file>#<row>`.

Rows are read one after another from a row group that is never whole in memory. Those that follow each other, as in all
orders by path, cost one pass; a step back begins the row group again.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.images import MAX_BYTES, BrokenImage, read_image

ROW_PATH = re.compile(r"(.+\.parquet)#(\d{8})", re.IGNORECASE | re.DOTALL)
_open = threading.local()
"""The table that this thread read last."""


def row_path(file: str, row: int) -> str:
    """Such paths sort as the rows do."""
    return f"{file}#{row:08d}"


def image_column(schema: pa.Schema) -> str | None:
    """Dotted name of the column that holds images: one called `image`, else the only one of bytes, or of structs with
    bytes, as the datasets library of Hugging Face writes them. None: there is none."""
    found: dict[str, str] = {}
    for of in schema:
        kind, name = of.type, of.name
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, name = kind.field("bytes").type, f"{of.name}.bytes"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            found[of.name] = name
    if len(found) == 1:
        return next(iter(found.values()))
    return found.get("image")


def read_image_bytes(root: Path, path: str) -> bytes:
    """The bytes of an image of a listing.

    Raises:
        BrokenImage: no such file or row, no bytes in it, or more than images.MAX_BYTES.
        OSError: it cannot be read.
    """
    in_table = ROW_PATH.fullmatch(path)
    if not in_table:
        return read_image(root / path)
    file, row = root / in_table[1], int(in_table[2])
    try:
        status = file.stat()
        key = (str(file), status.st_size, status.st_mtime_ns)
        if getattr(_open, "key", None) != key:
            _open.key, _open.table = None, _Table(file)
            _open.key = key
        table: _Table = _open.table
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
    def __init__(self, file: Path):
        self._file = pq.ParquetFile(file, buffer_size=1 << 20)
        column = image_column(self._file.schema_arrow)
        if column is None:
            raise LookupError("it has no column of images")
        self._column = column
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._group = -1
        self._next = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._damage: dict[int, tuple[int, BaseException]] = {}
        """Row group → the first row that cannot be read, and why; nor can those behind it."""

    def read(self, row: int) -> bytes:
        if row >= self._starts[-1]:
            raise BrokenImage("no such row")
        group = bisect_right(self._starts, row) - 1
        first, why = self._damage.get(group, (row + 1, None))
        if row >= first and why:
            raise why
        try:
            return self._read(group, row)
        except BrokenImage:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            self._damage[group] = row, error
            raise

    def _read(self, group: int, row: int) -> bytes:
        if group != self._group or row < self._next:
            self._group, self._next = group, self._starts[group]
            # One row in a batch: images may be large, and those that are stepped over are not kept.
            self._batches = self._file.iter_batches(1, row_groups=[group], columns=[self._column])
        while True:
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid("the row group ends too early")
            self._next += 1
            if self._next > row:
                break
        value = batch.column(0)[0]
        if isinstance(value, pa.StructScalar) and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            raise BrokenImage("the row holds no bytes")
        data: bytes = value.as_py()
        if len(data) > MAX_BYTES:
            raise BrokenImage(f"{len(data):,} bytes are more than {MAX_BYTES:,}")
        return data
