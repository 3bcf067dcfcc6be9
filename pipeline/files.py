"""Atomic writes of files and folders: to a temporary path, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PARTIAL_SUFFIX = ".partial"
"""Suffix of temporary paths."""
FREE_SPACE_ADVICE = "free some disk space or change `storage`, then rerun the same command"


def is_uri(location: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder, which replaces `path` if the block succeeds.

    A file is synced; the content of a folder is not.
    """
    # Two workers may write the same file: one that was presumed dead, and its replacement.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        yield partial
        if not partial.is_dir():
            sync(partial)
        rename_durably(partial, path)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Like `atomic_replace`, with user errors.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    try:
        with atomic_replace(path) as partial:
            yield partial
    except Exception as error:
        if isinstance(error, OSError) or (disk_is_full(error) and not isinstance(error, UserError)):
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write {path}: {reason}; {FREE_SPACE_ADVICE}") from error
        raise


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or folder durably: after a power failure it has either the old or the new name."""
    os.replace(source, target)
    with suppress(OSError):  # not every network file system syncs folders
        sync(target.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically; UserError if the disk is full or the folder is not writable."""
    with atomic_write(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def create_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; give another --storage") from error
    return path


def disk_is_full(error: BaseException) -> bool:
    """Check the error number or, for errors of torch and safetensors, the message."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        text in str(error) for text in ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
    )
