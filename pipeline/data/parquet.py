"""The splits on disk: one row an image, in Parquet, with all that a training needs to know about the data.

A split folder holds splits.json and <split>/<task>-<part>.parquet. The schema metadata of every file repeats
the description, so that a file that was sent elsewhere still says what its labels mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.find import printable
from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.splits import ScannedImage
from pipeline.errors import UserError

ROW_GROUP_BYTES = 16 << 20
PART_BYTES = 256 << 20
FORMAT = 1
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
    `class_words`: class folder → words for CLIP; `counts`: split → task → images."""

    classes: dict[str, list[str]]
    class_words: dict[str, str]
    shots: int
    seed: int
    source_fingerprint: str
    counts: dict[str, dict[str, int]]
    format: int = FORMAT

    @property
    def tasks(self) -> list[str]:
        return list(self.classes)

    def words(self, task: str) -> list[str]:
        """Words of the task's classes, by label."""
        return [self.class_words[folder] for folder in self.classes[task]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Part:
    """One Parquet file to write: its name relative to the split folder, and its rows."""

    file: str
    split: Split
    images: tuple[ScannedImage, ...]


def scan_image(root: Path, path: str, task: str, class_folder: str) -> ScannedImage:
    """Reads and decodes one file; what is wrong with it goes into `error`."""
    data, error = b"", None
    try:
        if path != printable(path):
            error = "the file name is not UTF-8"
        elif not (root / path).is_file():  # reading a pipe would wait forever
            error = "no such file"
        else:
            data = (root / path).read_bytes()
            decode_rgb(data)
    except OSError as fault:
        error = f"cannot be read: {fault.strerror}"
    except BrokenImage as fault:
        error = str(fault)
    return ScannedImage(printable(path), task, class_folder, hashlib.sha256(data).hexdigest(), error)


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
    # A worker that was given up for lost may still write the same part.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(root, part, description, partial)
        os.replace(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {target}: {reason}; free some space or change `storage`") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return len(part.images)


def _write_rows(root: Path, part: Part, description: SplitDescription, target: Path) -> None:
    schema = COLUMNS.with_metadata({"splits": description.to_json()})
    labels = {task: {name: i for i, name in enumerate(names)} for task, names in description.classes.items()}
    # Compressing JPEG again costs time and gains nothing.
    compression = {name: "none" if name == "image" else "zstd" for name in COLUMNS.names}
    few_values = ["task", "class_name", "split"]
    with pq.ParquetWriter(target, schema, compression=compression, use_dictionary=few_values) as writer:
        rows: list[dict[str, object]] = []
        size = 0
        for position, image in enumerate(part.images):
            data = _read_unchanged(root, image)
            rows.append(
                {
                    "image": data,
                    "task": image.task,
                    "label": labels[image.task][image.class_folder],
                    "class_name": description.class_words[image.class_folder],
                    "path": image.path,
                    "split": part.split,
                    "sha256": image.sha256,
                }
            )
            size += len(data)
            if size >= ROW_GROUP_BYTES or position == len(part.images) - 1:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
                rows, size = [], 0


def _read_unchanged(root: Path, image: ScannedImage) -> bytes:
    try:
        data = (root / image.path).read_bytes()
    except OSError as error:
        raise UserError(f"{root / image.path} cannot be read any more: {error.strerror}; run again") from None
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise UserError(f"{root / image.path} changed while the splits were built; run again")
    return data


def _file_stem(task: str) -> str:
    return quote(task, safe=" ")


class SplitReader:
    """Reads a split folder; checks on opening that it is one."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "splits.json"
        if not file.is_file():
            raise UserError(f"{folder} is no split folder: splits.json is missing; build it with jobs/build_splits.py")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found = values["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file} does not describe splits ({error!r}); build it again") from None
        if found != FORMAT:
            raise UserError(f"{file} has format {found!r}, this version reads {FORMAT}; build it again")
        names = SplitDescription.__dataclass_fields__
        self.description = SplitDescription(**{name: values[name] for name in names})

    def rows(self, split: Split, task: str, columns: Sequence[str] = ("image", "label")) -> Iterator[dict]:
        """Rows of a task's split in stored order, one row group in memory at a time.

        Raises:
            UserError: a file that is missing, damaged, or not of these splits, by name.
        """
        if task not in self.description.classes:
            raise UserError(f"{self.folder} has no task {task!r}; tasks: {', '.join(self.description.tasks)}")
        files = sorted((self.folder / split).glob(f"{_file_stem(task)}-?????.parquet"))
        found = sum(self._checked(path).num_rows for path in files)
        expected = self.description.counts[split][task]
        if found != expected:
            raise UserError(
                f"{self.folder / split} has {found} images of task {task!r}, splits.json says {expected}: "
                f"remove {self.folder} and build it again"
            )
        for path in files:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    try:
                        rows = file.read_row_group(group, columns=list(columns)).to_pylist()
                    except (pa.ArrowException, OSError) as error:
                        raise UserError(f"{path} cannot be read any more: {error}; remove {self.folder}") from None
                    yield from rows

    def _checked(self, path: Path) -> pq.FileMetaData:
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {error}") from None
        if not schema.equals(COLUMNS):
            raise UserError(f"{path} is no split file: columns {schema.names}, not {COLUMNS.names}")
        if (metadata.metadata or {}).get(b"splits") != self.description.to_json().encode():
            raise UserError(f"{path} belongs to other splits than {self.folder / 'splits.json'}")
        return metadata
