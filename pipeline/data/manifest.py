"""Manifests: tables with one row per image, in CSV, TSV or Parquet.

Columns (renamed with `data.columns`): `task`, `label` (class name), `path` or, in Parquet only, `image` (bytes, or
Hugging Face's struct of bytes and path), and `split` with data.use_official_splits.

Choices:
- errors are reported with their lines or rows, many at once, before anything else starts;
- an image in a table has a path too, `<file>#<row>`, so later code treats it as a file;
- a table is read in batches without its images; a small file that decompresses into a large table is refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import MAX_TEXT_BYTES, read_text
from pipeline.data.names import escape_for_terminal, invalid_name_reason, truncated_list
from pipeline.data.official_splits import SPLIT_NAMES, DatasetEntry, OfficialSplit, TableRow
from pipeline.data.symlinks import SymlinkChecker
from pipeline.data.table_images import ROW_PATH, image_column, row_path
from pipeline.errors import UserError

SUFFIXES = (".csv", ".tsv", ".parquet")
MAX_ROWS = 10_000_000
MAX_TEXT = 1000
"""Characters of a task or label."""
MAX_PATH = 4096
MIN_IMAGE_BYTES = 32
"""Lower bound on the bytes of an image in a table."""
MAX_COMPRESSION_RATIO = 200
"""Limit for a table's images, which are compressed already; does not apply up to SMALL_COLUMN bytes."""
SMALL_COLUMN = 16 << 20
MAX_ERRORS_SHOWN = 20
MAX_ERRORS = 1000
"""Reading stops after this many."""
BATCH_ROWS = 4096


@dataclass
class _RowCollector:
    """Collects the rows of a manifest and their errors."""

    manifest: Path
    root: Path
    symlinks: SymlinkChecker
    tasks: frozenset[str] | None
    """Tasks to use; None: all. Rows of other tasks are not checked."""
    entries: list[DatasetEntry] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    row_by_path: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Path → task, label and location of its row."""

    def add(self, location: str, values: Mapping[str, str | None], embedded: tuple[str, TableRow] | None) -> None:
        """Add a row. `embedded`: path and row of an image that is stored in the table itself."""
        try:
            task = _normalize_text("task", values["task"])
            if self.tasks is not None and task not in self.tasks:
                return
            label = _normalize_text("label", values["label"])
            split = _parse_split(values["split"]) if "split" in values else None
            path = embedded[0] if embedded else self._relative_path(values["path"])
            if duplicate := self.row_by_path.get(path):
                contradiction = f", as {duplicate[0]}/{duplicate[1]}" if duplicate[:2] != (task, label) else ""
                raise ValueError(f"{escape_for_terminal(path)} is also in {duplicate[2]}{contradiction}")
        except ValueError as error:
            self.errors.append(f"{location}: {error}")
            if len(self.errors) == MAX_ERRORS:
                self.raise_errors()
            return
        self.row_by_path[path] = task, label, location
        self.entries.append(DatasetEntry(path, task, label, split, embedded and embedded[1]))

    def _relative_path(self, text: str | None) -> str:
        """Return the path relative to the root. Raises ValueError if it is invalid."""
        if not text:
            raise ValueError("the path is empty")
        if len(text) > MAX_PATH or (reason := invalid_name_reason(text)):
            raise ValueError(
                f"the path {reason if len(text) <= MAX_PATH else 'is too long'}: {escape_for_terminal(text[:200])}"
            )
        full_path = os.path.normpath(self.root / text)
        path = os.path.relpath(full_path, self.root)
        if path == ".." or path.startswith("../"):
            if not self.symlinks.allow_external:
                raise ValueError(
                    f"{text} is outside of {self.root}: move the manifest to a folder above all images, or allow it "
                    "with --data.follow_external_symlinks true"
                )
            path = full_path
        if ROW_PATH.fullmatch(path):
            raise ValueError(f"{text} has the form of a row of a Parquet file (<file>.parquet#<row>)")
        return path

    def raise_errors(self) -> None:
        """Raise UserError if there are errors."""
        if self.errors:
            listed = "\n  ".join(self.errors[:MAX_ERRORS_SHOWN])
            num_hidden = len(self.errors) - MAX_ERRORS_SHOWN
            qualifier = "at least " if len(self.errors) == MAX_ERRORS else ""
            remainder = f"\n  and {qualifier}{num_hidden} more" if num_hidden > 0 else ""
            raise UserError(f"invalid rows in {self.manifest}:\n  {listed}{remainder}")


def read_manifest(
    manifest: Path,
    root: Path,
    columns: Mapping[str, str],
    tasks: Collection[str] | None,
    class_order: Sequence[str] | None,
    read_splits: bool,
    symlinks: SymlinkChecker,
) -> tuple[list[DatasetEntry], dict[str, str]]:
    """Read a manifest, a file or a folder of Parquet files; return its images, with paths relative to `root`, and
    path → line or row.

    Args:
        columns: standard name of a column → its name in the manifest, if different.
        tasks: tasks to use; None: all.
        class_order: class names for numeric labels; None: numeric labels without names are refused.
        read_splits: whether to read the split of each image.

    Raises:
        UserError: not a manifest, missing columns, invalid rows (with line or row), links out of the root.
    """
    files = sorted(manifest.glob("*.parquet")) if manifest.is_dir() else [manifest]
    if not files:
        raise UserError(f"data.root={manifest} contains no .parquet files")
    rows = _RowCollector(manifest, root, symlinks, None if tasks is None else frozenset(tasks))
    for file in files:
        if symlinks.escapes_root(file):
            symlinks.raise_on_escape(root)
        match file.suffix.lower():
            case ".parquet":
                _read_parquet(file, rows, columns, class_order, read_splits)
            case ".csv" | ".tsv":
                _read_text_table(file, rows, columns, class_order, read_splits)
            case _:
                raise UserError(f"data.root={file} is neither a folder nor a manifest ({', '.join(SUFFIXES)})")
    rows.raise_errors()
    for folder in {os.path.dirname(entry.path) for entry in rows.entries if not entry.table_row}:
        symlinks.escapes_root(root / folder)
    return rows.entries, {path: location for path, (*_, location) in rows.row_by_path.items()}


def _normalize_text(column: str, text: str | None) -> str:
    """Return a task or label in NFC. Raises ValueError if it is invalid."""
    if not text or not text.strip():
        raise ValueError(f"the {column} is empty, or a number without a name")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the {column} has more than {MAX_TEXT} characters")
    if reason := invalid_name_reason(text) or ("begins or ends with a space" if text != text.strip() else None):
        raise ValueError(f"the {column} '{escape_for_terminal(text)}' {reason}")
    if column == "task" and "/" in text:
        raise ValueError(f"the task '{text}' contains a slash")
    return unicodedata.normalize("NFC", text)


def _parse_split(text: str | None) -> OfficialSplit:
    name = (text or "").strip().lower()
    if name not in SPLIT_NAMES:
        raise ValueError(f"the split '{escape_for_terminal(name[:40])}' is not one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name]


def _column_positions(
    file: Path, names: Sequence[str], required: Sequence[str], columns: Mapping[str, str]
) -> dict[str, int]:
    """Return column → its position in the file's `names`. Raises UserError if one is missing or repeated."""
    name_by_column = {column: columns.get(column, column) for column in required}
    for column, name in name_by_column.items():
        if names.count(name) != 1:
            problem = "no column" if name not in names else "more than one column"
            hint = f" The expected separator is {_separator(file)!r}." if len(names) == 1 else ""
            raise UserError(
                f"{file} has {problem} {name!r}; columns: {truncated_list((repr(name)[:80] for name in names), 20)}."
                f"{hint} To use another column: --data.columns '{{{column}: <name>}}'"
            )
    return {column: list(names).index(name) for column, name in name_by_column.items()}


def _class_of_number(number: int, class_order: Sequence[str]) -> str | None:
    """Return the class that a numeric label means: the one with this name if class names are numbers, else the one at
    this position, counted from 0."""
    if any(name.isdecimal() for name in class_order):
        return str(number)
    return class_order[number] if 0 <= number < len(class_order) else None


# --- CSV -----------------------------------------------------------------------------------------------------


def _separator(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _read_text_table(
    file: Path, rows: _RowCollector, columns: Mapping[str, str], class_order: Sequence[str] | None, read_splits: bool
) -> None:
    text = read_text(file, f"data.root={file}").removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(file), strict=True)
    required = ["path", "task", "label", *(["split"] if read_splits else [])]
    try:
        names = next(reader, [])
        positions = _column_positions(file, names, required, columns)
        only_numbers = True
        for fields in reader:
            if not fields:
                continue
            location = f"line {reader.line_num}"
            if len(fields) != len(names):
                rows.errors.append(f"{location}: {len(fields)} fields, the header has {len(names)}")
                rows.raise_errors()
            values: dict[str, str | None] = {column: fields[position].strip() for column, position in positions.items()}
            is_number = fields[positions["label"]].strip().isdecimal()
            only_numbers &= is_number
            if is_number and class_order is not None:
                values["label"] = _class_of_number(int(fields[positions["label"]][:MAX_TEXT]), class_order)
            rows.add(location, values, None)
    except csv.Error as error:
        raise UserError(f"{file}: line {reader.line_num}: {error}; quotes must be doubled and closed") from None
    if only_numbers and class_order is None and rows.entries:
        raise UserError(
            f"{file} has only numeric labels, but CLIP needs class names: list them in the order of the numbers from 0 "
            "with --data.class_names (or lines `0<TAB>class name`)"
        )


# --- Parquet -------------------------------------------------------------------------------------------------


def _read_parquet(
    file: Path, rows: _RowCollector, columns: Mapping[str, str], class_order: Sequence[str] | None, read_splits: bool
) -> None:
    if reason := invalid_name_reason(file.name):
        raise UserError(f"the file name '{escape_for_terminal(file.name)}' {reason}; rename it")
    file_split = re.split(r"[-_.]", file.name.lower())[0]
    try:
        status = file.stat()
        schema = pq.read_schema(file)
        image = image_column(schema)
        required = ["task", "label"] if image else ["path", "task", "label"]
        split_column = columns.get("split", "split")
        if read_splits and (split_column in schema.names or file_split not in SPLIT_NAMES):
            required.append("split")
        positions = _column_positions(file, schema.names, required, columns)
        text_columns = {
            column: _TextColumn(file, schema, position, class_order if column == "label" else None)
            for column, position in positions.items()
        }
        # Dictionary-encoded, a long value is not in memory once per row.
        dictionary_columns = [column.name for column in text_columns.values() if column.is_text]
        with pq.ParquetFile(file, buffer_size=1 << 20, read_dictionary=dictionary_columns) as table:
            _check_compression_ratio(file, table.metadata, [column.name for column in text_columns.values()], image)
            for number, (group, row) in enumerate(_iter_rows(table, text_columns)):
                if read_splits and "split" not in row:
                    row["split"] = file_split
                path = row_path(os.path.relpath(file, rows.root), number)
                table_row = TableRow(status.st_size, status.st_mtime_ns, group)
                rows.add(f"{file.name}, row {number}", row, (path, table_row) if image else None)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as Parquet: {str(error).strip():.300}") from None


def _iter_rows(
    table: pq.ParquetFile, text_columns: Mapping[str, _TextColumn]
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield the row group and values of each row."""
    names = [column.name for column in text_columns.values()]
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
            texts = {column: reader.read(batch.column(reader.name)) for column, reader in text_columns.items()}
            for position in range(batch.num_rows):
                yield group, {column: values[position] for column, values in texts.items()}


class _TextColumn:
    """A column read as text: text unchanged, numbers replaced by their class names."""

    def __init__(self, file: Path, schema: pa.Schema, position: int, class_order: Sequence[str] | None):
        column = schema.field(position)
        self.name = column.name
        dtype = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        names = _hugging_face_names(schema, column.name)
        self.is_text = not pa.types.is_integer(dtype)
        self._number_to_name: Callable[[int], str | None] | None = None
        if pa.types.is_integer(dtype):
            if names is not None:
                self._number_to_name = lambda number: names[number] if 0 <= number < len(names) else None
            elif class_order is not None:
                self._number_to_name = lambda number: _class_of_number(number, class_order)
            else:
                raise UserError(
                    f"the column {column.name!r} of {file} has numbers without names: replace them with names, or list "
                    "the names of labels in the order of the numbers from 0 with --data.class_names"
                )
        elif not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)):
            raise UserError(f"the column {column.name!r} of {file} has type {dtype}; it must be text")

    def read(self, column: pa.Array) -> list[str | None]:
        """Convert a column to a list; each distinct value becomes a Python object once, to bound memory."""
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        values: list[Any]
        if self._number_to_name:
            values = [
                None if value is None else self._number_to_name(value) for value in encoded.dictionary.to_pylist()
            ]
        else:
            if (pc.max(pc.binary_length(encoded.dictionary)).as_py() or 0) > 4 * MAX_PATH:
                raise ValueError(f"a value of {self.name!r} has more than {MAX_PATH} characters")
            values = encoded.dictionary.to_pylist()
        return [None if code is None else values[code] for code in encoded.indices.to_pylist()]


def _hugging_face_names(schema: pa.Schema, column: str) -> Sequence[str] | None:
    """Return the names of a ClassLabel column, which the datasets library stores in the schema's metadata."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_compression_ratio(
    file: Path, metadata: pq.FileMetaData, text_columns: Sequence[str], image: str | None
) -> None:
    """Raise UserError if a small file claims to decompress into a large table."""
    size, rows = os.path.getsize(file), metadata.num_rows
    is_suspicious = rows > MAX_ROWS or (image is not None and rows * MIN_IMAGE_BYTES > size)
    text_bytes = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in text_columns:
                text_bytes += column.total_uncompressed_size
            elif column.path_in_schema == image:
                limit = max(MAX_COMPRESSION_RATIO * column.total_compressed_size, SMALL_COLUMN)
                is_suspicious |= column.total_uncompressed_size > limit
    if is_suspicious or text_bytes > MAX_TEXT_BYTES:
        raise UserError(f"{file} is not a manifest: {rows:,} rows in only {size:,} bytes")
