"""Read and decode each image of a data set once; the result is a table with one row per image, in the index's order."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.buckets import AnyPath
from pipeline.data.contents import ImageContent, read_contents
from pipeline.data.findings import CheckedImage
from pipeline.data.image_stats import ImageStats, image_stats, thumbnail
from pipeline.data.images import decode_rgb
from pipeline.data.index import ImageRecord
from pipeline.data.parquet import scan_image
from pipeline.data.splits import ScannedImage
from pipeline.files import read_parquet

SAMPLES_PER_CLASS = 3
"""Thumbnails per class and task, at most."""
MAX_SAMPLES = 3000
"""Thumbnails in all, for a page of at most about 10 MB."""
BATCH_ROWS = 1 << 16
_STATS = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.dictionary(pa.int16(), pa.string())),
        ("format", pa.dictionary(pa.int16(), pa.string())),
        ("frames", pa.int32()),
        ("orientation", pa.int64()),
        ("contrast", pa.float64()),
        ("phash", pa.uint64()),
        ("bits", pa.int32()),
        ("dark", pa.float64()),
        ("bright", pa.float64()),
        ("transparent", pa.float64()),
    ]
)
"""Null for broken images."""
COLUMNS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("task", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("class_folder", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("error", pa.string()),
        *_STATS,
        pa.field("thumbnail", pa.binary()),
    ]
)


def sample_paths(images: Sequence[ImageRecord]) -> frozenset[str]:
    """Choose samples of each class of each task, balanced within MAX_SAMPLES. Paths with the lowest SHA-256 are chosen:
    a deterministic choice that needs no image."""
    paths_by_class: dict[tuple[str, str], list[tuple[bytes, str]]] = defaultdict(list)
    for image in images:
        digest = hashlib.sha256(image.path.encode("utf-8", "surrogateescape")).digest()
        paths_by_class[image.task, image.class_folder].append((digest, image.path))
    chosen = [
        (rank, *candidate)
        for candidates in paths_by_class.values()
        for rank, candidate in enumerate(heapq.nsmallest(SAMPLES_PER_CLASS, candidates))
    ]
    return frozenset(path for _, _, path in sorted(chosen)[:MAX_SAMPLES])


def check_images(root: AnyPath, images: Sequence[ImageRecord], samples: Collection[str]) -> pa.Table:
    """Read and decode each image, with thumbnails of the paths in `samples`; return a table of COLUMNS."""
    contents = read_contents(root, [image.path for image in images])
    rows = [_row(root, image, content, image.path in samples) for image, content in zip(images, contents, strict=True)]
    return pa.Table.from_pylist(rows, schema=COLUMNS)


def read_checked_images(file: Path, images: Sequence[ImageRecord]) -> list[CheckedImage]:
    """Read the table of `check_images` for the index's images."""
    table = read_parquet(file, [name for name in COLUMNS.names if name != "thumbnail"])
    scans = zip(*(table[name].to_pylist() for name in ("path", "sha256", "error", "size")), strict=True)
    stats = zip(*(table[name].to_pylist() for name in _STATS.names), strict=True)
    return [
        CheckedImage(
            ScannedImage(
                image.path if image.path == path else path,  # the index's string, to save memory
                image.task,
                image.class_folder,
                sha256,
                error,
                size,
                image.official_split,
                image.other_classes,
            ),
            ImageStats(*values) if error is None else None,
        )
        for image, (path, sha256, error, size), values in zip(images, scans, stats, strict=True)
    ]


def read_samples(file: Path) -> dict[tuple[str, str], list[bytes]]:
    """Return (task, class folder) → thumbnails as JPEGs, in order of their paths."""
    samples: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH_ROWS, columns=["task", "class_folder", "thumbnail"]):
            for row in batch.filter(batch["thumbnail"].is_valid()).to_pylist():
                samples[row["task"], row["class_folder"]].append(row["thumbnail"])
    return dict(samples)


def _row(root: AnyPath, image: ImageRecord, content: ImageContent, is_sample: bool) -> dict[str, object]:
    row: dict[str, object] = {}

    def collect_stats(data: bytes) -> None:
        pixels = decode_rgb(data)
        stats = image_stats(data, pixels)
        row.update({name: getattr(stats, name) for name in _STATS.names})
        if is_sample:
            row["thumbnail"] = thumbnail(pixels)

    scanned = scan_image(root, image.path, image.task, image.class_folder, collect_stats, content)
    for name in ("path", "task", "class_folder", "sha256", "size", "error"):
        row[name] = getattr(scanned, name)
    return row
