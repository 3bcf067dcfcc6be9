"""What the pages of a Parquet file say they unfold into, before any is unfolded: pyarrow believes each page, and the
sums in a file's footer may be others. A page's header is a struct in Thrift's compact form, of which two numbers count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow.parquet as pq

_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3
"""Numbers of the fields of a page header."""
_BINARY, _STRUCT = 8, 12
"""Page headers have no lists and no maps."""
_FIXED_BYTES = {1: 0, 2: 0, 3: 1, 7: 8}
"""Kinds of fields of one length: true, false, byte, double."""
_WHOLE_NUMBERS = (4, 5, 6)
_MAX_DEPTH = 8


def unfolded_bytes(stream: BinaryIO, column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Sum over the pages of a column chunk, and the largest of them.

    Raises:
        ValueError: the pages do not follow each other as the chunk says.
    """
    at = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset)
    end = at + column.total_compressed_size
    if end > stream.seek(0, os.SEEK_END):
        raise ValueError("a column that is longer than its file")
    total = largest = 0
    while at < end:
        stream.seek(at)
        header = _page_header(stream)
        unfolded, stored = header.get(_UNCOMPRESSED_SIZE, -1), header.get(_COMPRESSED_SIZE, -1)
        if unfolded < 0 or stored < 0:
            raise ValueError("a page without a size")
        total, largest = total + unfolded, max(largest, unfolded)
        at = stream.tell() + stored
    if at != end:
        raise ValueError("a page that is longer than its column")
    return total, largest


def _page_header(stream: BinaryIO) -> dict[int, int]:
    """The whole numbers among a struct's fields."""
    numbers: dict[int, int] = {}
    for field, kind in _fields(stream):
        if kind in _WHOLE_NUMBERS:
            numbers[field] = _signed(_varint(stream))
        else:
            _step_over(stream, kind, depth=1)
    return numbers


def _fields(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Number and kind of each field of a struct; the caller reads the value before it asks for the next."""
    field = 0
    while (head := _byte(stream)) != 0:
        field = field + (head >> 4) if head >> 4 else _signed(_varint(stream))
        yield field, head & 15


def _step_over(stream: BinaryIO, kind: int, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("structs that are nested too deeply")
    if kind in _FIXED_BYTES:
        stream.seek(_FIXED_BYTES[kind], os.SEEK_CUR)
    elif kind in _WHOLE_NUMBERS:
        _varint(stream)
    elif kind == _BINARY:
        stream.seek(_varint(stream), os.SEEK_CUR)
    elif kind == _STRUCT:
        for _, of_field in _fields(stream):
            _step_over(stream, of_field, depth + 1)
    else:
        raise ValueError(f"a field of kind {kind}")


def _byte(stream: BinaryIO) -> int:
    if not (byte := stream.read(1)):
        raise ValueError("a page header that does not end")
    return byte[0]


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number that does not end")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
