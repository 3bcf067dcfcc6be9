"""Splits on disk: Parquet with one row per image, and all that training needs to know about the data.

A split folder contains splits.json and <split>/<task>-<part>.parquet. The schema metadata of every file repeats the
description, so that each file is self-contained. A digest of every row group detects corruption on reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from pipeline.buckets import AnyPath
from pipeline.data.contents import ImageContent, read_content, read_contents
from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.names import escape_for_terminal
from pipeline.data.splits import ScannedImage
from pipeline.errors import UserError, escape_controls
from pipeline.files import atomic_write

ROW_GROUP_BYTES = 16 << 20
PART_BYTES = 256 << 20
MIN_ROW_BYTES = 32
"""Lower bound on the bytes of a row: its SHA-256 alone."""
MAX_STEM = 150
"""Characters of a task in a file name; 28 Chinese characters, percent-encoded, reach the limit of file systems."""
FORMAT = 3
"""Increment on every change of what is written, PART_BYTES included: it is part of the folder's name."""
Split = Literal["train", "test"]

COLUMNS = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


_LISTS = {"label": pa.list_(pa.int32()), "class_name": pa.list_(pa.string())}
MULTI_LABEL_COLUMNS = pa.schema(
    [pa.field(column.name, _LISTS.get(column.name, column.type), nullable=False) for column in COLUMNS]
)
"""With data.multi_label: an image's labels, ascending, and their class names."""


@dataclass(frozen=True)
class SplitDescription:
    """Description of a data set's splits. `classes`: task → class folders, the position is the label; `class_names`:
    class folder → class name; `counts`: split → task → number of images; `multi_label`: an image may have several
    labels."""

    classes: dict[str, list[str]]
    class_names: dict[str, str]
    shots: int
    seed: int
    source_fingerprint: str
    counts: dict[Split, dict[str, NonNegativeInt]]
    format: int = FORMAT
    multi_label: bool = False

    @property
    def columns(self) -> pa.Schema:
        """Columns of the files."""
        return MULTI_LABEL_COLUMNS if self.multi_label else COLUMNS

    @property
    def tasks(self) -> list[str]:
        return list(self.classes)

    @property
    def content(self) -> dict[str, Any]:
        """Values that determine which images are in the splits."""
        return {"images": self.source_fingerprint, "shots": self.shots, "seed": self.seed}

    def class_names_for(self, task: str) -> list[str]:
        """Return the names of the task's classes, by label."""
        return [self.class_names[folder] for folder in self.classes[task]]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for splits.json; `multi_label` is there only if it is true."""
        return {name: value for name, value in vars(self).items() if name != "multi_label" or value}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Part:
    """One Parquet file to write: its name relative to the split folder, and its rows."""

    file: str
    split: Split
    images: tuple[ScannedImage, ...]


def scan_image(
    root: AnyPath,
    path: str,
    task: str,
    class_folder: str,
    decode: Callable[[bytes], object] = decode_rgb,
    content: ImageContent | None = None,
) -> ScannedImage:
    """Read and decode one indexed image; `error` of the result says what is wrong with it.

    Args:
        decode: may raise BrokenImage.
        content: the image, if it has been read.
    """
    content = content or read_content(root, path)
    error = content.error
    if error is None:
        try:
            decode(content.data)
        except BrokenImage as exception:
            error = escape_controls(str(exception))
    return ScannedImage(escape_for_terminal(path), task, class_folder, content.sha256, error, len(content.data))


def plan_parts(images: Sequence[ScannedImage], split: Split, sizes: dict[str, int]) -> list[Part]:
    """Partition a split's images, by task and in their order, into files of about PART_BYTES.

    Args:
        sizes: path → bytes.
    """
    parts: list[Part] = []
    for task in sorted({image.task for image in images}):
        chunk: list[ScannedImage] = []
        total = number = 0
        task_images = [image for image in images if image.task == task]
        for position, image in enumerate(task_images):
            chunk.append(image)
            total += sizes[image.path]
            if total >= PART_BYTES or position == len(task_images) - 1:
                parts.append(Part(f"{split}/{_file_stem(task)}-{number:05d}.parquet", split, tuple(chunk)))
                chunk, total, number = [], 0, number + 1
    return parts


def write_part(root: AnyPath, part: Part, description: SplitDescription, folder: Path) -> int:
    """Write `part` to a Parquet file below `folder`, one row group in memory at a time; return its number of rows.

    Raises:
        UserError: an image changed since it was scanned, or `folder` is not writable.
    """
    target = folder / part.file
    with atomic_write(target) as partial:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(root, part, description, partial)
    return len(part.images)


def _write_rows(root: AnyPath, part: Part, description: SplitDescription, target: Path) -> None:
    schema = description.columns.with_metadata({"splits": description.to_json()})
    labels = {task: {name: i for i, name in enumerate(names)} for task, names in description.classes.items()}
    # Images are compressed already.
    compression = {name: "none" if name == "image" else "zstd" for name in COLUMNS.names}
    dictionary_columns = ["task", *([] if description.multi_label else ["class_name"]), "split"]
    with pq.ParquetWriter(target, schema, compression=compression, use_dictionary=dictionary_columns) as writer:
        rows: list[dict[str, object]] = []
        digests: list[str] = []
        size = 0
        contents = read_contents(root, [image.path for image in part.images])
        for position, (image, content) in enumerate(zip(part.images, contents, strict=True)):
            data = _unchanged(root, image, content)
            image_labels = sorted(labels[image.task][name] for name in image.class_folders)
            class_names = [description.class_names[description.classes[image.task][label]] for label in image_labels]
            rows.append(
                {
                    "image": data,
                    "task": image.task,
                    "label": image_labels if description.multi_label else image_labels[0],
                    "class_name": class_names if description.multi_label else class_names[0],
                    "path": image.path,
                    "split": part.split,
                    "sha256": image.sha256,
                }
            )
            size += len(data)
            if size >= ROW_GROUP_BYTES or position == len(part.images) - 1:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
                digests.append(_digest(rows))
                rows, size = [], 0
        writer.add_key_value_metadata({"row_groups": json.dumps(digests)})


def _digest(rows: Sequence[dict[str, object]]) -> str:
    """Return a digest of all columns but the images, whose SHA-256 is one of them."""
    values = [[row[name] for name in COLUMNS.names if name != "image"] for row in rows]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _unchanged(root: AnyPath, image: ScannedImage, content: ImageContent) -> bytes:
    if content.error:
        raise UserError(f"{root / image.path} can no longer be read: {content.error}; run again")
    if content.sha256 != image.sha256:
        raise UserError(f"{root / image.path} changed while the splits were being built; run again")
    return content.data


def _file_stem(task: str) -> str:
    stem = quote(task, safe=" ")
    if len(stem) <= MAX_STEM:
        return stem
    return f"{stem[: MAX_STEM - 65]}~{hashlib.sha256(task.encode()).hexdigest()}"


_DESCRIPTION = TypeAdapter(SplitDescription)


class SplitReader:
    """Reader of a split folder.

    Raises:
        UserError: not a split folder, another format, or an incomplete description.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "splits.json"
        if not file.is_file():
            raise UserError(
                f"{folder} is not a split folder: splits.json is missing; build it with mmap-clip build-splits"
            )
        try:
            values = json.loads(file.read_bytes())
            file_format = values["format"]
            if file_format == FORMAT:
                values.setdefault("multi_label", False)
                fields = {name: values[name] for name in SplitDescription.__dataclass_fields__}
                self.description = _DESCRIPTION.validate_json(json.dumps(fields), strict=True)
                _check_complete(self.description)
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            reason = error.errors()[0] if isinstance(error, ValidationError) else error
            raise UserError(f"{file} is not a valid description of splits ({reason!r:.300}); build it again") from None
        if file_format != FORMAT:
            raise UserError(f"{file} has format {file_format!r:.80}; this version reads {FORMAT}: build it again")

    def rows(self, split: Split, task: str, columns: Sequence[str] = ("image", "label")) -> Iterator[dict[str, Any]]:
        """Yield the rows of a task's split in stored order, one row group in memory at a time.

        Raises:
            UserError: a file is missing, corrupted, or belongs to other splits.
        """
        names = [name for name in COLUMNS.names if name != "image" or "image" in columns]
        for path, metadata in self._files(split, task):
            try:
                digests = json.loads(metadata.metadata[b"row_groups"])
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        rows = file.read_row_group(group, columns=names).to_pylist()
                        self._check_rows(rows, split, task, digests[group])
                        yield from ({name: row[name] for name in columns} for row in rows)
            except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"{path} is corrupted: {str(error).strip()}; remove {self.folder}") from None

    def rows_at(
        self, split: Split, task: str, positions: Collection[int], columns: Sequence[str]
    ) -> dict[int, dict[str, Any]]:
        """Return position → row for some rows of a task's split; only their row groups are read.

        Raises:
            UserError: as `rows`.
        """
        rows: dict[int, dict[str, Any]] = {}
        start = 0
        for path, metadata in self._files(split, task):
            try:
                with pq.ParquetFile(path) as file:
                    for group in range(metadata.num_row_groups):
                        end = start + metadata.row_group(group).num_rows
                        if selected := [position for position in positions if start <= position < end]:
                            table = file.read_row_group(group, columns=list(columns))
                            taken = table.take([position - start for position in selected])
                            rows |= zip(selected, taken.to_pylist())
                        start = end
            except (pa.ArrowException, OSError, ValueError, LookupError) as error:
                raise UserError(f"{path} is corrupted: {str(error).strip()}; remove {self.folder}") from None
        return rows

    def _files(self, split: Split, task: str) -> list[tuple[Path, pq.FileMetaData]]:
        """Return the files of a task's split in order, with their metadata."""
        if task not in self.description.classes:
            raise UserError(f"{self.folder} has no task {task!r}; tasks: {', '.join(self.description.tasks)}")
        files = sorted((self.folder / split).glob(f"{_file_stem(task)}-?????.parquet"))
        all_metadata = [self._read_metadata(path) for path in files]
        num_rows = sum(metadata.num_rows for metadata in all_metadata)
        expected = self.description.counts[split][task]
        if num_rows != expected:
            raise UserError(
                f"{self.folder / split} has {num_rows} images of task {task!r}, splits.json says {expected}: "
                f"remove {self.folder} and build it again"
            )
        return list(zip(files, all_metadata))

    def _check_rows(self, rows: Sequence[dict[str, Any]], split: Split, task: str, digest: str) -> None:
        """Raise ValueError if rows were changed after writing, or are inconsistent."""
        if _digest(rows) != digest:
            raise ValueError("digest mismatch")
        class_names = self.description.class_names_for(task)
        for row in rows:
            if "image" in row and hashlib.sha256(row["image"]).hexdigest() != row["sha256"]:
                raise ValueError(f"SHA-256 mismatch of {row['path']}")
            labels, names = row["label"], row["class_name"]
            if not self.description.multi_label:
                labels, names = [labels], [names]
            is_valid = labels and all(0 <= label < len(class_names) for label in labels)
            if not is_valid or names != [class_names[label] for label in labels]:
                raise ValueError(f"{row['path']} has label {row['label']} and class {row['class_name']!r}")
            if (row["task"], row["split"]) != (task, split):
                raise ValueError(f"{row['path']} is of task {row['task']!r}, split {row['split']!r}")

    def _read_metadata(self, path: Path) -> pq.FileMetaData:
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
            images = [metadata.row_group(group).column(0) for group in range(metadata.num_row_groups)]
            is_compressed = any(column.compression != "UNCOMPRESSED" or column.has_dictionary_page for column in images)
            size = path.stat().st_size
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {str(error).strip()}; remove {self.folder}") from None
        if not schema.equals(self.description.columns):
            raise UserError(f"{path} is not a split file: columns {schema.names}, expected {COLUMNS.names}")
        if (metadata.metadata or {}).get(b"splits") != self.description.to_json().encode():
            raise UserError(f"{path} belongs to other splits than {self.folder / 'splits.json'}")
        # A small file must not decompress into a large table: images are stored uncompressed.
        if is_compressed or metadata.num_rows * MIN_ROW_BYTES > size:
            raise UserError(f"{path} is not a split file: {metadata.num_rows} rows in only {size:,} bytes")
        return metadata


def _check_complete(description: SplitDescription) -> None:
    """Raise ValueError if classes lack names, or tasks lack counts."""
    folders = {name for names in description.classes.values() for name in names}
    if missing := sorted(folders - description.class_names.keys()):
        raise ValueError(f"class_names lacks {missing[:10]}")
    for split in get_args(Split):
        if description.counts.get(split, {}).keys() != description.classes.keys():
            raise ValueError(f"counts of {split!r} do not match the tasks {list(description.classes)[:10]}")
