"""Manifests: tables with one row per image, in CSV, TSV, JSON lines or Parquet.

Columns (renamed with `data.columns`): `task`, `label` (class name), `path` or, in Parquet only, `image` (bytes, or
Hugging Face's struct of bytes and path), and `split` with data.use_official_splits. With data.multi_label, a label may
be a list (JSON lines, Parquet) or several names separated by `;`, and an image of a file may have several rows.

Choices:
- errors are reported with their lines or rows, many at once, before anything else starts;
- a value has the same meaning in every format and type: 0, 0.0, "0" and false are the same label;
- what is read otherwise than as documented (a column under another name, another separator) is a note to the user;
- an image in a table has a path too, `<file>#<row>`, so later code treats it as a file;
- a table is read in batches without its images; a small file that decompresses into a large table is refused.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.buckets import AnyPath, BucketPath, relative_path
from pipeline.config import MAX_TEXT_BYTES, did_you_mean, read_text
from pipeline.data.names import LABEL_SEPARATOR, escape_for_terminal, invalid_name_reason, pluralize, truncated_list
from pipeline.data.official_splits import SPLIT_NAMES, DatasetEntry, OfficialSplit, TableRow, parse_split_name
from pipeline.data.symlinks import SymlinkChecker
from pipeline.data.table_images import ROW_PATH, ImageColumn, find_image_column, open_table, row_path
from pipeline.data.walk import IMAGE_SUFFIXES, is_junk
from pipeline.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ALIASES = {
    "path": "imagepath filepath imgpath filename file imagefile imagefilename imagename image img".split(),
    "task": "domain domainname taskname".split(),
    "label": "class classname classlabel category categoryname labelname target y".split(),
    "split": "subset partition set".split(),
}
"""Column → other names that people give it, lower case and without separators."""
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
SEVERAL_LABELS = "if an image may have several labels: --data.multi_label true"
_PANDAS = 'python -c "import pandas; pandas.{reader}({file!r}).to_csv({csv!r}, index=False)"'
_REMEDIES = {
    (".xlsx", ".xls", ".ods"): "a spreadsheet: save it as CSV (UTF-8)",
    (".json",): f"JSON: write one object per line as .jsonl, or convert it: {_PANDAS.replace('{reader}', 'read_json')}",
    (".feather", ".arrow"): 'Arrow: write it as Parquet: python -c "import pyarrow.feather, pyarrow.parquet; '
    'pyarrow.parquet.write_table(pyarrow.feather.read_table({file!r}), {parquet!r})"',
    (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar"): "compressed: unpack it",
    (".txt",): "text: rename it to .csv or .tsv if it is a table",
    (".ndjson",): "JSON lines: rename it to .jsonl",
    (".pkl", ".pickle"): "a pickle, which may run code: save it as CSV or Parquet where you trust it",
    (".npz", ".npy", ".mat", ".h5", ".hdf5", ".tfrecord", ".lmdb"): "arrays: write the images as files, or as bytes "
    "into Parquet",
}
"""Suffixes of other files → what they are, and how to make a table of them."""
csv.field_size_limit(MAX_TEXT_BYTES)  # the limit of the file: a long text in another column is no error


@dataclass(frozen=True)
class Manifest:
    """Images of a manifest, with paths relative to the root; `locations`: path → line or row; `notes`: what was not
    read as documented, for the user."""

    entries: list[DatasetEntry]
    locations: dict[str, str]
    notes: tuple[str, ...]


@dataclass
class _RowCollector:
    """Collects the rows of a manifest and their errors."""

    manifest: AnyPath
    root: AnyPath
    symlinks: SymlinkChecker
    tasks: frozenset[str] | None
    """Tasks to use; None: all. Rows of other tasks are not checked."""
    class_names: Callable[[str], Collection[str] | None]
    """Task → its classes in data.class_names, in the order of the file; None: it has no file."""
    multi_label: bool
    entries: list[DatasetEntry] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    task_names: set[str] = field(default_factory=set)
    """All tasks of the table."""
    row_by_path: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Path → position of its entry, and location of its row."""
    num_backslashes: int = 0
    label_alternatives: list[str] = field(default_factory=list)
    """Columns other than that of the labels that may have their names."""
    has_only_numbers: dict[str, bool] = field(default_factory=dict)
    """Task → whether all its labels are numbers without names."""

    def add(
        self,
        location: str,
        values: Mapping[str, str | None],
        embedded: tuple[str, TableRow] | None = None,
        is_named: bool = False,
    ) -> None:
        """Add a row.

        Args:
            embedded: path and row of an image that is stored in the table itself.
            is_named: the label is a name, even if it looks like a number.
        """
        try:
            task = _normalize_text("task", _without_zero_fraction(values["task"]))
            self.task_names.add(task)
            if self.tasks is not None and task not in self.tasks:
                return
            label, *more_labels = self._labels(task, values["label"], is_named)
            split = _parse_split(values["split"]) if "split" in values else None
            path = embedded[0] if embedded else self._relative_path(values["path"])
            entry = DatasetEntry(path, task, label, split, embedded and embedded[1], tuple(more_labels))
            if row := self.row_by_path.get(path):
                number, first_location = row
                self.entries[number] = self._merge(self.entries[number], entry, first_location)
                return
        except ValueError as error:
            self.add_error(location, error)
            return
        self.row_by_path[path] = len(self.entries), location
        self.entries.append(entry)

    def _merge(self, earlier: DatasetEntry, entry: DatasetEntry, location: str) -> DatasetEntry:
        """Return the entry of an image with the labels of two rows. Raises ValueError if an image has one row only, or
        the rows contradict."""
        if self.multi_label and (earlier.task, earlier.split) == (entry.task, entry.split):
            labels = dict.fromkeys((*earlier.other_classes, *entry.class_folders))
            labels.pop(earlier.class_folder, None)
            return earlier._replace(other_classes=tuple(labels))
        contradiction = ""
        if earlier[1:3] != entry[1:3]:
            contradiction = f", as {earlier.task}/{earlier.class_folder}"
        if earlier.task == entry.task and earlier.class_folder != entry.class_folder and not self.multi_label:
            contradiction += f"; {SEVERAL_LABELS}"
        raise ValueError(f"{escape_for_terminal(entry.path)} is also in {location}{contradiction}")

    def add_error(self, location: str, error: ValueError | str) -> None:
        self.errors.append(f"{location}: {error}")
        if len(self.errors) == MAX_ERRORS:
            self.raise_errors()

    def note(self, message: str) -> None:
        self.notes[message] = None

    def _labels(self, task: str, text: str | None, is_named: bool) -> list[str]:
        """Return the labels of a row, each once. Raises ValueError if one is invalid."""
        texts = [text] if text is None or not self.multi_label else map(str.strip, text.split(LABEL_SEPARATOR))
        names = (part if is_named else self._class_name(task, part) for part in texts)
        return list(dict.fromkeys(_normalize_text("label", name) for name in names))

    def _class_name(self, task: str, text: str | None) -> str | None:
        """Return the class that a label means; None: a number without a name. Raises ValueError if a number is not
        whole."""
        text = _without_zero_fraction(text)
        is_number = text is not None and len(text) <= MAX_TEXT and bool(_NUMBER.fullmatch(text))
        class_names = self.class_names(task)
        if class_names is None:
            self.has_only_numbers[task] = is_number and self.has_only_numbers.get(task, True)
            return text
        if not is_number or text is None or unicodedata.normalize("NFC", text) in class_names:
            return text
        number = {"true": "1", "false": "0"}.get(text.lower(), text)
        if not number.isdecimal():
            raise ValueError(f"the label {text} is not a whole number, and data.class_names has no such class")
        return _class_of_number(int(number), list(class_names))

    def _relative_path(self, text: str | None) -> str:
        """Return the path relative to the root. Raises ValueError if it is invalid."""
        if not text:
            raise ValueError("the path is empty")
        if isinstance(self.root, BucketPath) and text.startswith(f"{self.root.anchor}/"):
            text = text.removeprefix(self.root.anchor)
        if match := re.match(r"[A-Za-z]:[\\/]|\\\\|[A-Za-z][A-Za-z0-9+.-]*://", text):
            kind, remedy = _FOREIGN_PATHS.get(match[0].lower(), _FOREIGN_PATHS["://" if "://" in match[0] else ":"])
            raise ValueError(f"the path is {kind}: {escape_for_terminal(text[:200])}; {remedy}")
        if "\\" in text:  # file names with backslashes are refused in every layout
            self.num_backslashes += 1
            text = text.replace("\\", "/")
        if len(text) > MAX_PATH or (reason := invalid_name_reason(text)):
            raise ValueError(
                f"the path {reason if len(text) <= MAX_PATH else 'is too long'}: {escape_for_terminal(text[:200])}"
            )
        bucket = "" if isinstance(self.root, Path) else self.root.anchor
        root = str(self.root) if isinstance(self.root, Path) else self.root.location[len(bucket) :] or "/"
        full_path = os.path.normpath(os.path.join(root, text))
        path = os.path.relpath(full_path, root)
        if path == ".." or path.startswith("../"):
            if not self.symlinks.allow_external:
                raise ValueError(
                    f"{text} is outside of {self.root}: move the manifest to a folder above all images, or allow it "
                    "with --data.follow_external_symlinks true"
                )
            if text.startswith("/"):
                path = bucket + full_path
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


_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?(e[+-]?\d+)?|true|false", re.IGNORECASE)
"""Labels that are no names. Spreadsheets write decimal commas, and truth values in capitals."""
_FOREIGN_PATHS = {
    ":": ("one of Windows", "give it relative to the table's folder"),
    "file://": ("a URL", "remove file://"),
    "://": ("a URL", "download the images, and give their paths relative to the table's folder"),
}


def table_files(folder: AnyPath) -> Sequence[AnyPath]:
    """Return the Parquet files of a folder, or of the folders of its splits (`train/0000.parquet`)."""
    direct, nested = (
        sorted((file for file in _glob(folder, pattern) if is_table_name(file.name, ".parquet")), key=str)
        for pattern in ("*", "*/*.parquet")
    )
    return direct or nested


def _glob(folder: AnyPath, pattern: str) -> Iterable[AnyPath]:
    return folder.glob(pattern)


def is_table_name(name: str, *suffixes: str) -> bool:
    """Return whether this is the name of a table."""
    return name.lower().endswith(suffixes or SUFFIXES) and not is_junk(name)


def check_suffix(file: AnyPath) -> None:
    """Raise UserError, with a remedy, if the file is not a manifest."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        problem = next((text for suffixes, text in _REMEDIES.items() if suffix in suffixes), "another kind of file")
        paths = {"file": str(file), "csv": str(file.with_suffix(".csv")), "parquet": str(file.with_suffix(".parquet"))}
        raise UserError(
            f"data.root={file} is neither a folder nor a manifest ({', '.join(SUFFIXES)}) but {problem.format(**paths)}"
        )


def read_manifest(
    manifest: AnyPath,
    root: AnyPath,
    columns: Mapping[str, str],
    tasks: Collection[str] | None,
    class_names: Callable[[str], Collection[str] | None],
    read_splits: bool,
    symlinks: SymlinkChecker,
    multi_label: bool = False,
) -> Manifest:
    """Read a manifest, a file or a folder of Parquet files.

    Args:
        columns: standard name of a column → its name in the manifest, if different.
        tasks: tasks to use; None: all. A single one is the task of all rows if there is no such column.
        class_names: task → its classes in data.class_names, which numeric labels refer to; None: it has no file.
        read_splits: whether to read the split of each image.
        multi_label: whether an image may have several labels.

    Raises:
        UserError: not a manifest, missing columns, invalid rows (with line or row), labels that are only numbers, links
            out of the root.
    """
    files = table_files(manifest) if manifest.is_dir() else [manifest]
    task_filter = None if tasks is None else frozenset(tasks)
    rows = _RowCollector(manifest, root, symlinks, task_filter, class_names, multi_label)
    for file in files:
        if symlinks.escapes_root(file):
            symlinks.raise_on_escape(root)
        check_suffix(file)
        reader = {".parquet": _read_parquet, ".jsonl": _read_json_lines}.get(file.suffix.lower(), _read_text_table)
        reader(file, rows, columns, read_splits)
    rows.raise_errors()
    if not multi_label:
        _check_joined_labels(rows)
    if not rows.task_names:
        raise UserError(f"{manifest} has no rows: add one for each image")
    if missing := sorted(frozenset(tasks or ()) - rows.task_names):
        raise UserError(
            f"data.tasks: {', '.join(missing)} not found in {manifest}{did_you_mean(missing[0], rows.task_names)} "
            f"Found: {truncated_list(sorted(rows.task_names))}"
        )
    if numeric := [task for task, only_numbers in rows.has_only_numbers.items() if only_numbers]:
        raise UserError(
            f"{manifest} has only numeric labels (task {truncated_list(numeric, 3)}), but CLIP needs class names: list "
            "them in the order of the numbers from 0 with --data.class_names FILE (or lines `0<TAB>class name`)"
            + "".join(f", or use --data.columns '{{label: {name}}}'" for name in rows.label_alternatives)
        )
    if rows.num_backslashes:
        rows.note(f"\\ in {pluralize(rows.num_backslashes, 'path')} is read as /")
    for folder in {os.path.dirname(entry.path) for entry in rows.entries if not entry.table_row}:
        symlinks.escapes_root(root / folder)
    locations = {path: location for path, (_, location) in rows.row_by_path.items()}
    return Manifest(rows.entries, locations, tuple(rows.notes))


def _check_joined_labels(rows: _RowCollector) -> None:
    """Note labels that look like several; raise UserError if a part of one is a label too."""
    if not any(LABEL_SEPARATOR in entry.class_folder for entry in rows.entries):
        return
    labels = {(entry.task, entry.class_folder) for entry in rows.entries}
    joined = sorted((task, label) for task, label in labels if LABEL_SEPARATOR in label)
    for task, label in joined:
        part = next((text for text in map(str.strip, label.split(LABEL_SEPARATOR)) if (task, text) in labels), None)
        if part is not None:
            raise UserError(
                f"{rows.manifest}: task {task!r} has the label {label!r} besides {part!r}; {SEVERAL_LABELS}; if it is "
                f"one class, give it a name without `{LABEL_SEPARATOR}`"
            )
    rows.note(
        f"labels with `{LABEL_SEPARATOR}`, such as {escape_for_terminal(joined[0][1])!r}, are read as one class each; "
        + SEVERAL_LABELS
    )


def _normalize_text(column: str, text: str | None) -> str:
    """Return a task or label in NFC. Raises ValueError if it is invalid."""
    if text is None:
        raise ValueError(f"the {column} is empty, or a number without a name")
    if not text.strip():
        raise ValueError(f"the {column} is empty")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the {column} has more than {MAX_TEXT} characters")
    if reason := invalid_name_reason(text) or ("begins or ends with a space" if text != text.strip() else None):
        raise ValueError(f"the {column} '{escape_for_terminal(text)}' {reason}")
    if column == "task" and "/" in text:
        raise ValueError(f"the task '{text}' contains a slash")
    return unicodedata.normalize("NFC", text)


def _parse_split(text: str | None) -> OfficialSplit:
    name = (text or "").strip().lower()
    split = parse_split_name(name)
    if split is None:
        raise ValueError(f"the split '{escape_for_terminal(name[:40])}' is not one of {', '.join(SPLIT_NAMES)}")
    return split


def _without_zero_fraction(text: str | None) -> str | None:
    """Return `1` of `1.0` or `1,0`: a column of numbers with a gap is one of fractions to pandas and spreadsheets."""
    return text and re.sub(r"^([+-]?\d+)[.,]0+$", r"\1", text)


def _key(name: str) -> str:
    """Return a column's name as those of ALIASES are written."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _column_positions(
    file: AnyPath, names: Sequence[str], required: Sequence[str], columns: Mapping[str, str], rows: _RowCollector
) -> dict[str, int]:
    """Return column → its position in the file's `names`. A column of another name is taken if it is the only one that
    can be meant; one task needs no column if data.tasks names it.

    Raises:
        UserError: a column is missing, repeated or ambiguous.
    """
    positions: dict[str, int] = {}
    for column in required:
        name = columns.get(column, column)
        candidates = [name] if name in names else _similar_columns(names, column, columns)
        if candidates == [name] and names.count(name) == 1:
            positions[column] = names.index(name)
            if column == "label" and (others := _similar_columns(names, column, {})[1:]):
                rows.label_alternatives = others
            continue
        if len(candidates) == 1 and names.count(candidates[0]) == 1:
            positions[column] = names.index(candidates[0])
            rows.note(f"the column {candidates[0]!r} is read as {column!r} (to choose another: --data.columns)")
            continue
        if column == "task" and not candidates and rows.tasks and len(rows.tasks) == 1:
            rows.note(f"there is no column 'task': all rows are of the task {min(rows.tasks)!r} of data.tasks")
            continue
        listed = truncated_list((repr(text)[:80] for text in names), 20)
        if candidates == [name]:
            problem = f"more than one column {name!r}"
        elif candidates:
            problem = f"no column {name!r}, and {len(candidates)} that may be meant ({', '.join(candidates)})"
        else:
            problem = f"no column {name!r}"
        if any(Path(text).suffix.lower() in IMAGE_SUFFIXES for text in names):
            raise UserError(
                f"{file} has no header: its first line is {listed}. Add one that names the columns, such as "
                f"{','.join(required)}"
            )
        closest = did_you_mean(name, names) if name not in names else "; rename all but one."
        alternative = candidates[0] if candidates and candidates[0] != name else "<name>"
        remedy = f"To use another column: --data.columns '{{{column}: {alternative}}}'."
        one_task = " If all rows are of one task: --data.tasks <its name>" if column == "task" else ""
        raise UserError(f"{file} has {problem}; columns: {listed}{closest} {remedy}{one_task}")
    return positions


def _similar_columns(names: Sequence[str], column: str, columns: Mapping[str, str]) -> list[str]:
    """Return the columns that may be meant by one that data.columns does not name."""
    if column in columns:
        return []
    return [name for name in names if _key(name) in (column, *ALIASES[column]) and name not in columns.values()]


def _class_of_number(number: int, class_order: Sequence[str]) -> str | None:
    """Return the class that a numeric label means: the one with this name if class names are numbers, else the one at
    this position, counted from 0."""
    if any(name.isdecimal() for name in class_order):
        return str(number)
    return class_order[number] if 0 <= number < len(class_order) else None


def _with_task(values: dict[str, str | None], rows: _RowCollector) -> dict[str, str | None]:
    """Add the task that data.tasks names to a row of a table without such a column."""
    return values if "task" in values else {**values, "task": min(rows.tasks or ())}


# --- CSV and JSON lines --------------------------------------------------------------------------------------

_SEPARATORS = ",;\t|"
_OTHER_CONTENT = {
    b"PK\x03\x04": ("a spreadsheet or archive", "save it as CSV, or unpack it"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", "save it as CSV (UTF-8)"),
    b"PAR1": ("Parquet", "rename it to .parquet"),
    b"\x1f\x8b": ("compressed", "unpack it"),
}
"""First bytes of files that are no text → what they are, and the remedy."""


def _required_columns(read_splits: bool) -> list[str]:
    return ["path", "task", "label", *(["split"] if read_splits else [])]


def _read_lines(file: AnyPath) -> list[str]:
    """Return the lines of a text file. Raises UserError if it is another kind of file, or too large."""
    with file.open("rb") as stream:
        start = stream.read(4)
    for magic, (kind, remedy) in _OTHER_CONTENT.items():
        if start.startswith(magic):
            raise UserError(f"data.root={file} is {kind}, not text: {remedy}")
    if (size := file.stat().st_size) > MAX_TEXT_BYTES:
        raise UserError(
            f"data.root={file} has {size:,} bytes of text, more than {MAX_TEXT_BYTES:,}: leave out columns that are "
            "not needed, or save it as Parquet"
        )
    return read_text(file, f"data.root={file}").split("\n")


def _read_text_table(file: AnyPath, rows: _RowCollector, columns: Mapping[str, str], read_splits: bool) -> None:
    lines = _read_lines(file)
    header_line = next((number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")), None)
    if header_line is None:
        raise UserError(f"{file} is empty")
    required = _required_columns(read_splits)
    separator = _separator(file, lines[header_line], required, columns, rows)
    header_line += lines[header_line].lower().strip('"').startswith("sep=")
    reader = csv.reader(
        io.StringIO("\n".join(lines[header_line:]), newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    try:
        names = [name.strip() for name in next(reader, [])]
        positions = _column_positions(file, names, required, columns, rows)
        num_comments = header_line
        for fields in reader:
            if not any(fields):
                continue
            location = f"line {header_line + reader.line_num}"
            if len(fields) != len(names) and fields[0].startswith("#"):
                num_comments += 1
                continue
            if len(fields) < len(names) or any(fields[len(names) :]):
                rows.errors.append(f"{location}: {pluralize(len(fields), 'field')}, the header has {len(names)}")
                rows.raise_errors()
            rows.add(
                location, _with_task({name: fields[position].strip() for name, position in positions.items()}, rows)
            )
    except csv.Error as error:
        line = header_line + reader.line_num
        raise UserError(f"{file}: line {line}: {error}; quotes must be doubled and closed") from None
    if num_comments:
        rows.note(f"{pluralize(num_comments, 'line')} with # or before the header not read")


def _separator(
    file: AnyPath, header: str, required: Sequence[str], columns: Mapping[str, str], rows: _RowCollector
) -> str:
    """Return the separator with which the header has most of the required columns."""
    if header.lower().strip('"').startswith("sep=") and len(header.strip('"')) == len("sep=") + 1:  # Excel's hint
        return header.strip('"')[-1]
    expected = "\t" if file.suffix.lower() == ".tsv" else ","

    def num_found(separator: str) -> int:
        names = [name.strip(' "') for name in header.split(separator)]
        return sum(
            columns.get(column, column) in names or bool(_similar_columns(names, column, columns))
            for column in required
        )

    separator: str = max((expected, *_SEPARATORS), key=num_found)
    if separator != expected:
        rows.note(f"the table is separated by {separator!r}")
    return separator


def _read_json_lines(file: AnyPath, rows: _RowCollector, columns: Mapping[str, str], read_splits: bool) -> None:
    names: dict[str, str] = {}
    for number, line in enumerate(_read_lines(file), 1):
        if not line.strip():
            continue
        location = f"line {number}"
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("expected an object, {...}, on each line")
            if not names:
                header = list(record)
                positions = _column_positions(file, header, _required_columns(read_splits), columns, rows)
                names = {column: header[position] for column, position in positions.items()}
            values = {column: _as_text(column, record.get(name), rows.multi_label) for column, name in names.items()}
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            rows.add_error(location, f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error))
            continue
        rows.add(location, _with_task(values, rows))
    if not names:
        rows.raise_errors()
        raise UserError(f"{file} is empty")


def _as_text(column: str, value: Any, multi_label: bool = False) -> str | None:
    """Return a number, truth value or text as in a CSV file, and several labels joined. Raises ValueError if it is
    something else."""
    if isinstance(value, list) and column == "label":
        if not multi_label:
            raise ValueError(f"the label is a list; it must be one value; {SEVERAL_LABELS}")
        return _join_labels([_as_text(column, part) for part in value])
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"the {column} is a {type(value).__name__}; it must be one value")
    return str(value).strip()


def _join_labels(labels: Sequence[str | None]) -> str | None:
    """Return a list of labels as in a CSV file. Raises ValueError if one has the separator."""
    names = [label or "" for label in labels]
    if joined := [name for name in names if LABEL_SEPARATOR in name]:
        raise ValueError(f"the label {joined[0]!r} contains `{LABEL_SEPARATOR}`, which separates labels: rename it")
    return LABEL_SEPARATOR.join(names) or None


# --- Parquet -------------------------------------------------------------------------------------------------


def _read_parquet(file: AnyPath, rows: _RowCollector, columns: Mapping[str, str], read_splits: bool) -> None:
    if reason := invalid_name_reason(file.name):
        raise UserError(f"the file name '{escape_for_terminal(file.name)}' {reason}; rename it")
    file_split = _split_of_file(file)
    try:
        status = file.stat()
        with open_table(file) as table:
            schema, metadata = table.schema_arrow, table.metadata
        image = find_image_column(schema, metadata)
        required = ["task", "label"] if image and image.is_embedded else ["path", "task", "label"]
        if read_splits and (columns.get("split", "split") in schema.names or file_split is None):
            required.append("split")
        names = list(schema.names)
        if image and not image.is_embedded:  # a struct that names files
            names[names.index(image.column)] = columns.get("path", "path")
        _refuse_lists_of_images(file, schema, image)
        positions = _column_positions(file, names, required, columns, rows)
        text_columns = {
            column: _TextColumn(file, schema, position, column, image, rows.multi_label)
            for column, position in positions.items()
        }
        is_named = text_columns["label"].has_names
        # Dictionary-encoded, a long value is not in memory once per row.
        dictionary_columns = [column.name for column in text_columns.values() if column.is_text and not column.is_list]
        with open_table(file, buffer_size=1 << 20, read_dictionary=dictionary_columns) as table:
            embedded_name = image.name if image and image.is_embedded else None
            _check_compression_ratio(file, metadata, [column.name for column in text_columns.values()], embedded_name)
            for number, (group, row) in enumerate(_iter_rows(table, text_columns)):
                if read_splits and "split" not in row:
                    row["split"] = file_split
                path = row_path(relative_path(file, rows.root), number)
                table_row = TableRow(status.st_size, status.st_mtime_ns, status.st_ctime_ns, group)
                location = f"{file.name}, row {number}"
                rows.add(location, _with_task(row, rows), (path, table_row) if embedded_name else None, is_named)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as Parquet: {str(error).strip():.300}") from None


def _split_of_file(file: AnyPath) -> str | None:
    """Return the split that the name of a Parquet file or of its folder begins with; None: neither does."""
    words = (re.split(r"[-_.]", name.lower())[0] for name in (file.name, file.parent.name))
    return next((word for word in words if word in SPLIT_NAMES), None)


def _refuse_lists_of_images(file: AnyPath, schema: pa.Schema, image: ImageColumn | None) -> None:
    for column in [] if image else schema:
        value_type = getattr(column.type, "value_type", None)
        if value_type is not None and (pa.types.is_struct(value_type) or pa.types.is_binary(value_type)):
            raise UserError(
                f"the column {column.name!r} of {file} has a list of images in each row; a table has one row per "
                "image: write a row for each of them"
            )


def _iter_rows(
    table: pq.ParquetFile, text_columns: Mapping[str, _TextColumn]
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield the row group and values of each row."""
    names = [column.name for column in text_columns.values()]
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
            texts = {column: reader.read(batch) for column, reader in text_columns.items()}
            for position in range(batch.num_rows):
                yield group, {column: values[position] for column, values in texts.items()}


class _TextColumn:
    """A column read as text: text unchanged, numbers and truth values as in a CSV file, or replaced by their names in
    the metadata of Hugging Face's datasets library."""

    def __init__(
        self,
        file: AnyPath,
        schema: pa.Schema,
        position: int,
        meaning: str,
        image: ImageColumn | None,
        multi_label: bool,
    ):
        """
        Args:
            meaning: path, task, label or split.
            image: the column of images, whose paths are read if it has no images.
            multi_label: whether labels may be lists, which are joined.
        """
        self._column, is_path = schema.names[position], meaning == "path"
        is_struct = is_path and image is not None
        self.name = image.name if is_struct and image else self._column
        dtype = pa.string() if is_struct else schema.field(position).type
        is_several = meaning == "label" and (pa.types.is_list(dtype) or pa.types.is_large_list(dtype))
        self.is_list = is_several and multi_label
        dtype = dtype.value_type if self.is_list else dtype
        dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
        names = _hugging_face_names(schema, self._column)
        self._names = names if pa.types.is_integer(dtype) else None
        self.has_names = self._names is not None
        text_types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        other_types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
        self.is_text = any(test(dtype) for test in text_types)
        if not self.is_text and (is_path or not any(test(dtype) for test in other_types)):
            remedy = "a row has one task and one label" if pa.types.is_nested(dtype) else "write it as text"
            remedy += f"; {SEVERAL_LABELS}" if is_several and not multi_label else ""
            expected = "text" if is_path else "text or numbers"
            raise UserError(f"the column {self._column!r} of {file} has type {dtype}; it must be {expected}: {remedy}")

    def read(self, batch: pa.RecordBatch) -> list[str | None]:
        """Convert a column to a list; each distinct value becomes a Python object once, to bound memory."""
        column = batch.column(self._column)
        if self.is_list:
            texts = iter(self._read(column.flatten()))
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_pylist()
            return [_join_labels(list(islice(texts, length))) for length in lengths]
        return self._read(column)

    def _read(self, column: pa.Array) -> list[str | None]:
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "path")
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        if self.is_text and (pc.max(pc.binary_length(encoded.dictionary)).as_py() or 0) > 4 * MAX_PATH:
            raise ValueError(f"a value of {self.name!r} has more than {MAX_PATH} characters")
        values = [self._text(value) for value in encoded.dictionary.to_pylist()]
        return [None if code is None else values[code] for code in encoded.indices.to_pylist()]

    def _text(self, value: Any) -> str | None:
        if self._names is not None and value is not None:
            return self._names[value] if 0 <= value < len(self._names) else None
        return value if self.is_text else _as_text(self.name, value)


def _hugging_face_names(schema: pa.Schema, column: str) -> Sequence[str] | None:
    """Return the names of a ClassLabel column, which the datasets library stores in the schema's metadata."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # of a list of labels
        names = feature["names"]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_compression_ratio(
    file: AnyPath, metadata: pq.FileMetaData, text_columns: Sequence[str], image: str | None
) -> None:
    """Raise UserError if a small file claims to decompress into a large table, or has too many rows or texts."""
    size, rows = file.stat().st_size, metadata.num_rows
    is_suspicious = False
    text_bytes = num_images = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".list.")[0] in text_columns:
                text_bytes += column.total_uncompressed_size
            elif column.path_in_schema == image:
                limit = max(MAX_COMPRESSION_RATIO * column.total_compressed_size, SMALL_COLUMN)
                is_suspicious |= column.total_uncompressed_size > limit
                statistics = column.statistics
                num_nulls = statistics.null_count if statistics and statistics.has_null_count else 0
                num_images += column.num_values - num_nulls
    if is_suspicious or num_images * MIN_IMAGE_BYTES > size:
        raise UserError(f"{file} is not a manifest: {rows:,} rows in only {size:,} bytes")
    if rows > MAX_ROWS or text_bytes > MAX_TEXT_BYTES:
        raise UserError(
            f"{file} has {rows:,} rows with {text_bytes:,} bytes of {', '.join(text_columns)}, more than {MAX_ROWS:,} "
            f"or {MAX_TEXT_BYTES:,}: write it as several .parquet files into a folder, and set data.root to the folder"
        )
