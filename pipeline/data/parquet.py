"""The splits on disk: one row an image, in Parquet, with all that a training needs to know about the data.

A split folder holds splits.json and <split>/<task>-<part>.parquet. The schema metadata of every file repeats the
description, so that a file that was sent elsewhere still says what its labels mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.images import BrokenImage, decode_rgb
from pipeline.data.splits import ScannedImage
from pipeline.errors import UserError

ROW_GROUP_BYTES = 16 << 20
PART_BYTES = 256 << 20
FORMAT = 1
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
    try:
        path.encode()  # surrogates stand for bytes that are not UTF-8
        data = (root / path).read_bytes()
        decode_rgb(data)
        error = None
    except UnicodeEncodeError:
        data, error = b"", "file name is not UTF-8"
        path = path.encode("utf-8", "backslashreplace").decode()
    except (OSError, BrokenImage) as fault:
        data, error = b"", str(fault)
    return ScannedImage(path, task, class_folder, hashlib.sha256(data).hexdigest(), error)


def plan_parts(images: Sequence[ScannedImage], split: Split, sizes: dict[str, int]) -> list[Part]:
    """Cuts a split's images, by task and in their order, into files of about PART_BYTES; `sizes`: path → bytes."""
    parts: list[Part] = []
    for task in sorted({image.task for image in images}):
        chunk: list[ScannedImage] = []
        total = number = 0
        of_task = [image for image in images if image.task == task]
        for position, image in enumerate(of_task):
            chunk.append(image)
            total += sizes[image.path]
            if total >= PART_BYTES or position == len(of_task) - 1:
                parts.append(Part(f"{split}/{quote(task, safe=' ')}-{number:05d}.parquet", split, tuple(chunk)))
                chunk, total, number = [], 0, number + 1
    return parts


def write_part(root: Path, part: Part, description: SplitDescription, folder: Path) -> int:
    """Writes one Parquet file of `part` below `folder`, holding one row group in memory; returns its rows.

    Raises:
        UserError: a file changed since it was scanned.
    """
    target = folder / part.file
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = COLUMNS.with_metadata({"splits": description.to_json()})
    labels = {task: {name: i for i, name in enumerate(names)} for task, names in description.classes.items()}
    # Compressing JPEG again costs time and gains nothing.
    compression = {name: "none" if name == "image" else "zstd" for name in COLUMNS.names}
    with pq.ParquetWriter(target, schema, compression=compression, use_dictionary=["task", "class_name", "split"]) as writer:
        rows: list[dict[str, object]] = []
        size = 0
        for position, image in enumerate(part.images):
            data = (root / image.path).read_bytes()
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise UserError(f"{root / image.path} changed while the splits were built; run again")
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
    return len(part.images)


class SplitReader:
    """Reads a split folder; checks on opening that it is one."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "splits.json"
        if not file.is_file():
            raise UserError(f"{folder} is no split folder: splits.json is missing; build it with jobs/build_splits.py")
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise UserError(f"{file} has format {values.get('format')!r}, this version reads {FORMAT}; build it again")
        self.description = SplitDescription(**{name: values[name] for name in SplitDescription.__dataclass_fields__})

    def rows(self, split: Split, task: str, columns: Sequence[str] = ("image", "label")) -> Iterator[dict]:
        """Rows of a task's split in stored order, one row group in memory at a time."""
        files = sorted((self.folder / split).glob(f"{quote(task, safe=' ')}-?????.parquet"))
        if not files:
            raise UserError(f"{self.folder / split} has no file for task {task!r}; tasks: {self.description.tasks}")
        for path in files:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.remove_metadata().equals(COLUMNS):
                    raise UserError(f"{path} is no split file: columns {file.schema_arrow.names}, not {COLUMNS.names}")
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, columns=list(columns)).to_pylist()
