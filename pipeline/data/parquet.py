"""The splits on disk: one row an image, in Parquet, with all that a training needs to know about the data.

A split folder holds splits.json and <split>/<task>-<part>.parquet. The schema metadata of every file repeats
the description, so that a file that was sent elsewhere still says what its labels mean. A digest of every row group
tells on reading whether its rows are those that were written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.names import escape_for_terminal, invalid_name_reason
from pipeline.data.splits import ScannedImage
from pipeline.data.table_images import read_image_bytes
from pipeline.errors import UserError, escape_controls
from pipeline.files import atomic_write

ROW_GROUP_BYTES = 16 << 20
PART_BYTES = 256 << 20
MIN_ROW_BYTES = 32
"""A row's SHA-256 alone takes that much, however it is packed."""
MAX_STEM = 150
"""Characters of a file's name for its task; 28 Chinese ones would fill all that file systems take."""
FORMAT = 3
"""Counted up with every change of what is written, PART_BYTES included: it is part of the folder's name."""
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


@dataclass(frozen=True)
class SplitDescription:
    """What the splits of a data set mean. `classes`: task → class folders, the position is the label;
    `class_names`: class folder → words for CLIP; `counts`: split → task → images."""

    classes: dict[str, list[str]]
    class_names: dict[str, str]
    shots: int
    seed: int
    source_fingerprint: str
    counts: dict[Split, dict[str, NonNegativeInt]]
    format: int = FORMAT

    @property
    def tasks(self) -> list[str]:
        return list(self.classes)

    @property
    def content(self) -> dict[str, Any]:
        """What decides which images are in the splits, wherever and whenever they were read."""
        return {"images": self.source_fingerprint, "shots": self.shots, "seed": self.seed}

    def class_names_for(self, task: str) -> list[str]:
        """Words of the task's classes, by label."""
        return [self.class_names[folder] for folder in self.classes[task]]

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False, sort_keys=True)  # asdict would copy it all, for every file


@dataclass(frozen=True)
class Part:
    """One Parquet file to write: its name relative to the split folder, and its rows."""

    file: str
    split: Split
    images: tuple[ScannedImage, ...]


def scan_image(
    root: Path, path: str, task: str, class_folder: str, decode: Callable[[bytes], object] = decode_rgb
) -> ScannedImage:
    """Reads and decodes one image of a listing; what is wrong with it goes into `error`.

    Args:
        decode: may raise BrokenImage.
    """
    data, error = b"", None
    try:
        if fault := invalid_name_reason(path):
            error = f"the file name {fault}"
        else:
            data = read_image_bytes(root, path)
            decode(data)
    except OSError as fault:
        error = f"cannot be read: {fault.strerror}"
    except BrokenImage as fault:
        error = escape_controls(str(fault))
    return ScannedImage(
        escape_for_terminal(path), task, class_folder, hashlib.sha256(data).hexdigest(), error, len(data)
    )


def plan_parts(images: Sequence[ScannedImage], split: Split, sizes: dict[str, int]) -> list[Part]:
    """Cuts a split's images, by task and in their order, into files of about PART_BYTES.

    Args:
        sizes: path → bytes.
    """
    parts: list[Part] = []
    for task in sorted({image.task for image in images}):
        chunk: list[ScannedImage] = []
        total = number = 0
        of_task = [image for image in images if image.task == task]
        for position, image in enumerate(of_task):
            chunk.append(image)
            total += sizes[image.path]
            if total >= PART_BYTES or position == len(of_task) - 1:
                parts.append(Part(f"{split}/{_file_stem(task)}-{number:05d}.parquet", split, tuple(chunk)))
                chunk, total, number = [], 0, number + 1
    return parts


def write_part(root: Path, part: Part, description: SplitDescription, folder: Path) -> int:
    """Writes one Parquet file of `part` below `folder`, holding one row group in memory; returns its rows.

    Raises:
        UserError: a file changed since it was scanned, or `folder` cannot be written.
    """
    target = folder / part.file
    with atomic_write(target) as partial:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(root, part, description, partial)
    return len(part.images)


def _write_rows(root: Path, part: Part, description: SplitDescription, target: Path) -> None:
    schema = COLUMNS.with_metadata({"splits": description.to_json()})
    labels = {task: {name: i for i, name in enumerate(names)} for task, names in description.classes.items()}
    # Compressing JPEG again costs time and gains nothing.
    compression = {name: "none" if name == "image" else "zstd" for name in COLUMNS.names}
    few_values = ["task", "class_name", "split"]
    with pq.ParquetWriter(target, schema, compression=compression, use_dictionary=few_values) as writer:
        rows: list[dict[str, object]] = []
        digests: list[str] = []
        size = 0
        for position, image in enumerate(part.images):
            data = _read_unchanged(root, image)
            rows.append(
                {
                    "image": data,
                    "task": image.task,
                    "label": labels[image.task][image.class_folder],
                    "class_name": description.class_names[image.class_folder],
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
    """Of all but the images, whose own is among it."""
    values = [[row[name] for name in COLUMNS.names if name != "image"] for row in rows]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _read_unchanged(root: Path, image: ScannedImage) -> bytes:
    try:
        data = read_image_bytes(root, image.path)
    except (OSError, BrokenImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{root / image.path} cannot be read any more: {reason}; run again") from None
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise UserError(f"{root / image.path} changed while the splits were built; run again")
    return data


def _file_stem(task: str) -> str:
    stem = quote(task, safe=" ")
    if len(stem) <= MAX_STEM:
        return stem
    return f"{stem[: MAX_STEM - 65]}~{hashlib.sha256(task.encode()).hexdigest()}"


_DESCRIPTION = TypeAdapter(SplitDescription)


class SplitReader:
    """Reads a split folder; checks on opening that it is one.

    Raises:
        UserError: no split folder, one of another format, or one whose description is not whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "splits.json"
        if not file.is_file():
            raise UserError(f"{folder} is no split folder: splits.json is missing; build it with jobs/build_splits.py")
        try:
            values = json.loads(file.read_bytes())
            found = values["format"]
            if found == FORMAT:
                fields = {name: values[name] for name in SplitDescription.__dataclass_fields__}
                self.description = _DESCRIPTION.validate_json(json.dumps(fields), strict=True)
                _check_whole(self.description)
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            reason = error.errors()[0] if isinstance(error, ValidationError) else error
            raise UserError(f"{file} does not describe splits ({reason!r:.300}); build it again") from None
        if found != FORMAT:
            raise UserError(f"{file} has format {found!r:.80}, this version reads {FORMAT}; build it again")

    def rows(self, split: Split, task: str, columns: Sequence[str] = ("image", "label")) -> Iterator[dict[str, Any]]:
        """Rows of a task's split in stored order, one row group in memory at a time.

        Raises:
            UserError: a file that is missing, damaged, or not of these splits, by name.
        """
        if task not in self.description.classes:
            raise UserError(f"{self.folder} has no task {task!r}; tasks: {', '.join(self.description.tasks)}")
        files = sorted((self.folder / split).glob(f"{_file_stem(task)}-?????.parquet"))
        checked = [self._checked(path) for path in files]
        found = sum(metadata.num_rows for metadata in checked)
        expected = self.description.counts[split][task]
        if found != expected:
            raise UserError(
                f"{self.folder / split} has {found} images of task {task!r}, splits.json says {expected}: "
                f"remove {self.folder} and build it again"
            )
        names = [name for name in COLUMNS.names if name != "image" or "image" in columns]
        for path, metadata in zip(files, checked):
            try:
                digests = json.loads(metadata.metadata[b"row_groups"])
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        rows = file.read_row_group(group, columns=names).to_pylist()
                        self._check_rows(rows, split, task, digests[group])
                        yield from ({name: row[name] for name in columns} for row in rows)
            except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"{path} cannot be read any more: {str(error).strip()}; remove {self.folder}") from None

    def _check_rows(self, rows: Sequence[dict[str, Any]], split: Split, task: str, digest: str) -> None:
        """Raises: ValueError: rows that are not as they were written, or that were never right."""
        if _digest(rows) != digest:
            raise ValueError("its rows are not those that were written")
        words = self.description.class_names_for(task)
        for row in rows:
            if "image" in row and hashlib.sha256(row["image"]).hexdigest() != row["sha256"]:
                raise ValueError(f"the bytes of {row['path']} are not those that were written")
            if not 0 <= row["label"] < len(words) or row["class_name"] != words[row["label"]]:
                raise ValueError(f"{row['path']} has label {row['label']} and class {row['class_name']!r}")
            if (row["task"], row["split"]) != (task, split):
                raise ValueError(f"{row['path']} is of task {row['task']!r}, split {row['split']!r}")

    def _checked(self, path: Path) -> pq.FileMetaData:
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
            images = [metadata.row_group(group).column(0) for group in range(metadata.num_row_groups)]
            packed = any(column.compression != "UNCOMPRESSED" or column.has_dictionary_page for column in images)
            size = path.stat().st_size
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {str(error).strip()}; remove {self.folder}") from None
        if not schema.equals(COLUMNS):
            raise UserError(f"{path} is no split file: columns {schema.names}, not {COLUMNS.names}")
        if (metadata.metadata or {}).get(b"splits") != self.description.to_json().encode():
            raise UserError(f"{path} belongs to other splits than {self.folder / 'splits.json'}")
        # A small file must not unfold into a large table: images are stored as they are, each for itself.
        if packed or metadata.num_rows * MIN_ROW_BYTES > size:
            raise UserError(f"{path} is no split file: {metadata.num_rows} rows are packed into {size:,} bytes")
        return metadata


def _check_whole(description: SplitDescription) -> None:
    """Raises: ValueError: classes without words, tasks without counts."""
    folders = {name for names in description.classes.values() for name in names}
    if lacking := sorted(folders - description.class_names.keys()):
        raise ValueError(f"class_words lacks {lacking[:10]}")
    for split in get_args(Split):
        if description.counts.get(split, {}).keys() != description.classes.keys():
            raise ValueError(f"counts of {split!r} are not of the tasks {list(description.classes)[:10]}")
