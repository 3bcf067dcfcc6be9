"""Looks at each image of a data set once, and keeps what it saw as a table: a row an image, in the listing's order."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.findings import CheckedImage
from pipeline.data.image_stats import ImageStats, image_stats, thumbnail
from pipeline.data.images import decode_rgb
from pipeline.data.index import ImageRecord
from pipeline.data.parquet import scan_image
from pipeline.data.splits import ScannedImage

SAMPLES_PER_CLASS = 3
"""Of a class of a task, at most."""
MAX_SAMPLES = 3000
"""Of all, so that a page of them has no more than some 10 MB."""
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
    """Paths of samples of each class of each task, of equal numbers as far as MOST_SAMPLES reaches: those with the
    lowest SHA-256, so that they are the same every time, and known before any image is read."""
    of_class: dict[tuple[str, str], list[tuple[bytes, str]]] = defaultdict(list)
    for image in images:
        digest = hashlib.sha256(image.path.encode("utf-8", "surrogateescape")).digest()
        of_class[image.task, image.class_folder].append((digest, image.path))
    chosen = [
        (rank, *of)
        for members in of_class.values()
        for rank, of in enumerate(heapq.nsmallest(SAMPLES_PER_CLASS, members))
    ]
    return frozenset(path for _, _, path in sorted(chosen)[:MAX_SAMPLES])


def check_images(root: Path, images: Iterable[ImageRecord], samples: Collection[str]) -> pa.Table:
    """Reads and decodes each once, and makes thumbnails of the paths in `samples`; COLUMNS."""
    return pa.Table.from_pylist([_row(root, image, image.path in samples) for image in images], schema=COLUMNS)


def read_checked_images(file: Path, images: Sequence[ImageRecord]) -> list[CheckedImage]:
    """What `check_images` saw of a listing's images."""
    table = pq.read_table(file, columns=[name for name in COLUMNS.names if name != "thumbnail"])
    seen = zip(*(table[name].to_pylist() for name in ("path", "sha256", "error", "size")), strict=True)
    stats = zip(*(table[name].to_pylist() for name in _STATS.names), strict=True)
    return [
        CheckedImage(
            # The listing's own texts, which are in memory already.
            ScannedImage(
                of.path if of.path == path else path, of.task, of.class_folder, sha256, error, size, of.official_split
            ),
            ImageStats(*of_image) if error is None else None,
        )
        for of, (path, sha256, error, size), of_image in zip(images, seen, stats, strict=True)
    ]


def read_samples(file: Path) -> dict[tuple[str, str], list[bytes]]:
    """(task, class folder) → thumbnails as JPEGs, by path."""
    samples: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH_ROWS, columns=["task", "class_folder", "thumbnail"]):
            for row in batch.filter(batch["thumbnail"].is_valid()).to_pylist():
                samples[row["task"], row["class_folder"]].append(row["thumbnail"])
    return dict(samples)


def _row(root: Path, image: ImageRecord, is_sample: bool) -> dict[str, object]:
    found: dict[str, object] = {}

    def look(data: bytes) -> None:
        pixels = decode_rgb(data)
        stats = image_stats(data, pixels)
        found.update({name: getattr(stats, name) for name in _STATS.names})
        if is_sample:
            found["thumbnail"] = thumbnail(pixels)

    scanned = scan_image(root, image.path, image.task, image.class_folder, look)
    for name in ("path", "task", "class_folder", "sha256", "size", "error"):
        found[name] = getattr(scanned, name)
    return found
