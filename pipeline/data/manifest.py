"""Manifests: tables of images with a row for each, in CSV, TSV or Parquet.

Columns (`data.columns` gives other names): `task`, `label` (the class's name), `path` or, in Parquet only, `image` (the
bytes, or Hugging Face's struct of bytes and path), and `split` where given splits are respected.

Choices:
- faults are told with their lines or rows, many at once, before anything else starts;
- an image in a table has a path too, `<file>#<row>`, so that all that follows treats it as a file;
- a table is read in batches, and no image of it: a small file that unfolds into a large table is refused.
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
"""No image takes less, however a table is packed."""
MAX_COMPRESSION_RATIO = 200
"""No images become so many times larger by the compression of a table being undone, but for small ones."""
SMALL_COLUMN = 16 << 20
MAX_ERRORS_SHOWN = 20
MAX_ERRORS = 1000
"""Then the rest is not looked at."""
BATCH_ROWS = 4096


@dataclass
class _Rows:
    """Collects rows, and what is wrong with them."""

    manifest: Path
    root: Path
    symlinks: SymlinkChecker
    tasks: frozenset[str] | None
    """Those to use; None: all. The others' rows may have what they want."""
    found: list[DatasetEntry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    first_row: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Path → task, label and place of its row."""

    def add(self, place: str, values: Mapping[str, str | None], table: tuple[str, TableRow] | None) -> None:
        """A row. `table`: path of an image that lies in the table itself, and which row group."""
        try:
            task = _plain("task", values["task"])
            if self.tasks is not None and task not in self.tasks:
                return
            label = _plain("label", values["label"])
            split = _official_split(values["split"]) if "split" in values else None
            path = table[0] if table else self._path(values["path"])
            if before := self.first_row.get(path):
                other = f", as {before[0]}/{before[1]}" if before[:2] != (task, label) else ""
                raise ValueError(f"{escape_for_terminal(path)} is in {before[2]} too{other}")
        except ValueError as error:
            self.faults.append(f"{place}: {error}")
            if len(self.faults) == MAX_ERRORS:
                self.refuse()
            return
        self.first_row[path] = task, label, place
        self.found.append(DatasetEntry(path, task, label, split, table and table[1]))

    def _path(self, text: str | None) -> str:
        """Relative to the root. Raises: ValueError: no path of an image that may be used."""
        if not text:
            raise ValueError("the path is empty")
        if len(text) > MAX_PATH or (fault := invalid_name_reason(text)):
            raise ValueError(
                f"the path {fault if len(text) <= MAX_PATH else 'is too long'}: {escape_for_terminal(text[:200])}"
            )
        full = os.path.normpath(self.root / text)
        below = os.path.relpath(full, self.root)
        if below == ".." or below.startswith("../"):
            if not self.symlinks.allow_external:
                raise ValueError(
                    f"{text} leads out of {self.root}: move the manifest above all images, or allow it with "
                    "--data.follow_external_symlinks true"
                )
            below = full
        if ROW_PATH.fullmatch(below):
            raise ValueError(f"{text} is called as a row of a Parquet file")
        return below

    def refuse(self) -> None:
        """Raises: UserError: there are faults."""
        if self.faults:
            shown = "\n  ".join(self.faults[:MAX_ERRORS_SHOWN])
            hidden = len(self.faults) - MAX_ERRORS_SHOWN
            more = " or more" if len(self.faults) == MAX_ERRORS else ""
            rest = f"\n  and {hidden}{more} others" if hidden > 0 else ""
            raise UserError(f"rows of {self.manifest} cannot be used:\n  {shown}{rest}")


def read_manifest(
    manifest: Path,
    root: Path,
    columns: Mapping[str, str],
    tasks: Collection[str] | None,
    class_order: Sequence[str] | None,
    with_splits: bool,
    symlinks: SymlinkChecker,
) -> tuple[list[DatasetEntry], dict[str, str]]:
    """Images of a manifest, a file or a folder of Parquet files, with paths relative to `root`; and path → line or row.

    Args:
        columns: own name → the manifest's name of it, where that is another.
        tasks: those to use; None: all.
        class_order: names of the classes for labels that are numbers without names; None: such are refused.
        with_splits: whether the split of an image is asked for.

    Raises:
        UserError: no manifest, one that lacks columns, rows that cannot be used, by line or row; links that lead out of
            the root.
    """
    files = sorted(manifest.glob("*.parquet")) if manifest.is_dir() else [manifest]
    if not files:
        raise UserError(f"data.root={manifest} holds no .parquet files")
    rows = _Rows(manifest, root, symlinks, None if tasks is None else frozenset(tasks))
    for file in files:
        if symlinks.escapes_root(file):
            symlinks.refuse(root)
        match file.suffix.lower():
            case ".parquet":
                _read_parquet(file, rows, columns, class_order, with_splits)
            case ".csv" | ".tsv":
                _read_text_table(file, rows, columns, class_order, with_splits)
            case _:
                raise UserError(f"data.root={file} is no folder and no manifest ({', '.join(SUFFIXES)})")
    rows.refuse()
    for folder in {os.path.dirname(found.path) for found in rows.found if not found.table}:
        symlinks.escapes_root(root / folder)
    return rows.found, {path: place for path, (*_, place) in rows.first_row.items()}


def _plain(what: str, text: str | None) -> str:
    """A task or label, in the one form of its characters. Raises: ValueError: it cannot be one."""
    if not text or not text.strip():
        raise ValueError(f"the {what} is empty, or a number without a name")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the {what} has more than {MAX_TEXT} characters")
    if fault := invalid_name_reason(text) or ("begins or ends with a space" if text != text.strip() else None):
        raise ValueError(f"the {what} '{escape_for_terminal(text)}' {fault}")
    if what == "task" and "/" in text:
        raise ValueError(f"the task '{text}' holds a slash")
    return unicodedata.normalize("NFC", text)


def _official_split(text: str | None) -> OfficialSplit:
    word = (text or "").strip().lower()
    if word not in SPLIT_NAMES:
        raise ValueError(f"the split '{escape_for_terminal(word[:40])}' is none of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[word]


def _columns_of(file: Path, names: Sequence[str], wanted: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Own name → position among the file's `names`. Raises: UserError: one that is not there, or is there twice."""
    called = {own: columns.get(own, own) for own in wanted}
    for own, name in called.items():
        if names.count(name) != 1:
            how = "no column" if name not in names else "more than one column"
            hint = f" Fields are parted by {_separator(file)!r} here." if len(names) == 1 else ""
            raise UserError(
                f"{file} has {how} {name!r}; it has {truncated_list((repr(name)[:80] for name in names), 20)}.{hint} "
                "If another "
                f"one is meant: --data.columns '{{{own}: <its name>}}'"
            )
    return {own: list(names).index(name) for own, name in called.items()}


def _class_of(number: int, class_order: Sequence[str]) -> str | None:
    """The class that a label of digits means: the one of this name, or, where no class is called so, the one in this
    place, counted from 0."""
    if any(name.isdecimal() for name in class_order):
        return str(number)
    return class_order[number] if 0 <= number < len(class_order) else None


# --- CSV -----------------------------------------------------------------------------------------------------


def _separator(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _read_text_table(
    file: Path, rows: _Rows, columns: Mapping[str, str], class_order: Sequence[str] | None, with_splits: bool
) -> None:
    text = read_text(file, f"data.root={file}").removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(file), strict=True)
    wanted = ["path", "task", "label", *(["split"] if with_splits else [])]
    try:
        names = next(reader, [])
        at = _columns_of(file, names, wanted, columns)
        only_numbers = True
        for fields in reader:
            if not fields:
                continue
            place = f"line {reader.line_num}"
            if len(fields) != len(names):
                rows.faults.append(f"{place}: {len(fields)} fields, the first line has {len(names)}")
                rows.refuse()
            values: dict[str, str | None] = {own: fields[position].strip() for own, position in at.items()}
            is_number = fields[at["label"]].strip().isdecimal()
            only_numbers &= is_number
            if is_number and class_order is not None:
                values["label"] = _class_of(int(fields[at["label"]][:MAX_TEXT]), class_order)
            rows.add(place, values, None)
    except csv.Error as error:
        raise UserError(f"{file}: line {reader.line_num}: {error}; quotes must be doubled and closed") from None
    if only_numbers and class_order is None and rows.found:
        raise UserError(
            f"{file} has only numbers as labels, which say nothing to CLIP: give their names, in the order of the "
            "numbers from 0, with --data.class_names (or lines `0<TAB>words`)"
        )


# --- Parquet -------------------------------------------------------------------------------------------------


def _read_parquet(
    file: Path, rows: _Rows, columns: Mapping[str, str], class_order: Sequence[str] | None, with_splits: bool
) -> None:
    if fault := invalid_name_reason(file.name):
        raise UserError(f"the file name '{escape_for_terminal(file.name)}' {fault}; rename it")
    split_of_file = re.split(r"[-_.]", file.name.lower())[0]
    try:
        status = file.stat()
        schema = pq.read_schema(file)
        image = image_column(schema)
        wanted = ["task", "label"] if image else ["path", "task", "label"]
        split_column = columns.get("split", "split")
        if with_splits and (split_column in schema.names or split_of_file not in SPLIT_NAMES):
            wanted.append("split")
        at = _columns_of(file, schema.names, wanted, columns)
        of_column = {
            own: _Values(file, schema, position, class_order if own == "label" else None)
            for own, position in at.items()
        }
        # As a dictionary, a value that is long is not there once for each row.
        texts = [values.name for values in of_column.values() if values.is_text]
        with pq.ParquetFile(file, buffer_size=1 << 20, read_dictionary=texts) as table:
            _check_compression_ratio(file, table.metadata, [values.name for values in of_column.values()], image)
            for number, (group, row) in enumerate(_rows_of(table, of_column)):
                if with_splits and "split" not in row:
                    row["split"] = split_of_file
                path = row_path(os.path.relpath(file, rows.root), number)
                in_table = TableRow(status.st_size, status.st_mtime_ns, group)
                rows.add(f"{file.name}, row {number}", row, (path, in_table) if image else None)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as Parquet: {str(error).strip():.300}") from None


def _rows_of(table: pq.ParquetFile, of_column: Mapping[str, _Values]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Row group and values of each row."""
    names = [values.name for values in of_column.values()]
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
            texts = {own: values.read(batch.column(values.name)) for own, values in of_column.items()}
            for position in range(batch.num_rows):
                yield group, {own: of_own[position] for own, of_own in texts.items()}


class _Values:
    """A column as text: text as it is, numbers by the names of their classes."""

    def __init__(self, file: Path, schema: pa.Schema, position: int, class_order: Sequence[str] | None):
        of = schema.field(position)
        self.name = of.name
        kind = of.type.value_type if pa.types.is_dictionary(of.type) else of.type
        names = _hugging_face_names(schema, of.name)
        self.is_text = not pa.types.is_integer(kind)
        self._name_of: Callable[[int], str | None] | None = None
        if pa.types.is_integer(kind):
            if names is not None:
                self._name_of = lambda number: names[number] if 0 <= number < len(names) else None
            elif class_order is not None:
                self._name_of = lambda number: _class_of(number, class_order)
            else:
                raise UserError(
                    f"the column {of.name!r} of {file} holds numbers, and nothing says what they mean: write the names "
                    "in their place, or give those of labels, in the order of the numbers from 0, with "
                    "--data.class_names"
                )
        elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f"the column {of.name!r} of {file} holds {kind}; it must be text")

    def read(self, column: pa.Array) -> list[str | None]:
        """Each different value is made a Python object once, so that none is too long too often."""
        coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        values: list[Any]
        if self._name_of:
            values = [None if value is None else self._name_of(value) for value in coded.dictionary.to_pylist()]
        else:
            if (pc.max(pc.binary_length(coded.dictionary)).as_py() or 0) > 4 * MAX_PATH:
                raise ValueError(f"a value of {self.name!r} has more than {MAX_PATH} characters")
            values = coded.dictionary.to_pylist()
        return [None if code is None else values[code] for code in coded.indices.to_pylist()]


def _hugging_face_names(schema: pa.Schema, column: str) -> Sequence[str] | None:
    """Names of a ClassLabel column, which the datasets library leaves in the schema's metadata."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_compression_ratio(
    file: Path, metadata: pq.FileMetaData, text_columns: Sequence[str], image: str | None
) -> None:
    """Raises: UserError: what a small file claims to unfold into."""
    size, rows = os.path.getsize(file), metadata.num_rows
    packed = rows > MAX_ROWS or (image is not None and rows * MIN_IMAGE_BYTES > size)
    text_bytes = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in text_columns:
                text_bytes += column.total_uncompressed_size
            elif column.path_in_schema == image:
                allowed = max(MAX_COMPRESSION_RATIO * column.total_compressed_size, SMALL_COLUMN)
                packed |= column.total_uncompressed_size > allowed
    if packed or text_bytes > MAX_TEXT_BYTES:
        raise UserError(f"{file} is no manifest: {rows:,} rows are packed into {size:,} bytes")
