"""Identity of a data set by its contents: the bytes of all images, their names, tasks, classes and splits. Times,
hosts and the path of the root have no part in it, so a copy is the same data set."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.buckets import AnyPath
from pipeline.data.images import BrokenImage
from pipeline.data.index import DatasetIndex, ImageRecord
from pipeline.data.names import escape_for_terminal, invalid_name_reason
from pipeline.data.prefetch import prefetch
from pipeline.data.splits import MULTI_LABEL
from pipeline.data.table_images import ROW_PATH, read_image_bytes
from pipeline.errors import escape_controls

Argument = TypeVar("Argument")
Result = TypeVar("Result")
READ_THREADS = 24
"""More than cores: reading waits for disks and networks. pyarrow's S3 opens no more than 25 connections."""
IMAGES_PER_CHUNK = 64
UNREADABLE = "cannot be read: "
"""Start of the errors of a file system, which may be gone at the next attempt."""


@dataclass(frozen=True)
class ImageContent:
    """Bytes of an image, or, in `error`, why they cannot be read."""

    data: bytes
    error: str | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes; empty if they cannot be read."""
        return "" if self.error else hashlib.sha256(self.data).hexdigest()


def read_content(root: AnyPath, path: str) -> ImageContent:
    """Read an indexed image; errors are returned, not raised."""
    try:
        if reason := invalid_name_reason(path):
            return ImageContent(b"", f"the file name {reason}")
        return ImageContent(read_image_bytes(root, path))
    except OSError as error:
        return ImageContent(b"", f"{UNREADABLE}{_reason(error)}")
    except BrokenImage as error:
        return ImageContent(b"", escape_controls(str(error)))


def _reason(error: OSError) -> str:
    """Return the reason of an error, without the ids that a bucket gives each request."""
    return error.strerror or escape_controls(re.sub(r" *\(Request ID.*", "", str(error)))


def read_contents(root: AnyPath, paths: Sequence[str]) -> Iterator[ImageContent]:
    """Read indexed images in the order of `paths`; those of a bucket in threads, a few ahead."""
    if isinstance(root, Path) or any(map(ROW_PATH.fullmatch, paths)):
        yield from (read_content(root, path) for path in paths)
    else:
        yield from _map_in_threads(partial(read_content, root), paths)


def read_identities(index: DatasetIndex, on_read: Callable[[int], None] = lambda number: None) -> Iterator[str]:
    """Read all images in threads; yield the SHA-256 of each, or why it cannot be read, in the index's order.

    Args:
        on_read: called with the number of images that were read since the last call.
    """

    def read_chunk(images: Sequence[ImageRecord]) -> list[str]:
        contents = (read_content(index.root, image.path) for image in images)
        return [content.sha256 or content.error or "" for content in contents]

    chunks = split_into_chunks(index.images, IMAGES_PER_CHUNK if isinstance(index.root, Path) else 1)
    for identities in _map_in_threads(read_chunk, chunks):
        on_read(len(identities))
        yield from identities


def _map_in_threads(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """Yield the values of a function in order, with as many computed ahead as there are threads."""
    threads = ThreadPoolExecutor(READ_THREADS, "read")
    try:
        futures = (threads.submit(function, argument) for argument in arguments)
        yield from (future.result() for future in prefetch(futures, READ_THREADS))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def split_into_chunks(images: Sequence[ImageRecord], size: int) -> list[Sequence[ImageRecord]]:
    """Split into chunks of at least `size` images; row groups, read from their start, stay whole."""
    chunks, start = [], 0
    for end in range(1, len(images) + 1):
        if end == len(images) or (end - start >= size and not _same_group(images[end - 1], images[end])):
            chunks.append(images[start:end])
            start = end
    return chunks


def _same_group(a: ImageRecord, b: ImageRecord) -> bool:
    if a.row_group is None or a.row_group != b.row_group:
        return False
    return a.path.rpartition("#")[0] == b.path.rpartition("#")[0]


def dataset_fingerprint(index: DatasetIndex, identities: Iterable[str] | None = None) -> str:
    """Return the SHA-256 of names, contents, tasks, classes and splits of an index.

    Args:
        identities: SHA-256 of each image, or why it cannot be read, in the index's order; None: read them.
    """
    digest = hashlib.sha256(MULTI_LABEL if index.multi_label else b"")
    for image, identity in zip(index.images, read_identities(index) if identities is None else identities, strict=True):
        path = escape_for_terminal(image.path)
        values = (path, identity, image.task, *image.class_folders, image.official_split or "")
        digest.update(("\0".join(values) + "\n").encode())
    digest.update(repr((sorted(index.classes.items()), sorted(index.class_names.items()))).encode())
    return digest.hexdigest()
