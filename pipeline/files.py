"""Atomic writes of files and folders: to a temporary path, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PARTIAL_SUFFIX = ".partial"
"""Suffix of temporary paths."""
FREE_SPACE_ADVICE = "free some disk space or change `storage`, then rerun the same command"
SETTLED_NS = 2_000_000_000
"""Age of a file's last change from which its digest is remembered: later changes then have other times, whatever the
resolution of the file system's clock."""
_digests: dict[tuple[int, ...], str] = {}
"""Digests of this process: device, inode, size and times of a file → SHA-256."""


class DamagedFile(UserError):
    """A stored file that is cut, changed, or of another version."""


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
            raise UserError(f"cannot write {path}: {reason}; {write_advice(error)}") from error
        raise


def write_advice(error: BaseException) -> str:
    """Return what to do about a file or folder that could not be written."""
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make its folder writable for you or change `storage`, then rerun the same command"
    return FREE_SPACE_ADVICE


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
    write_file(path, to_json(value))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Raises: FileNotFoundError: There is no such file. DamagedFile: It is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON; remove it and rerun the command that made it") from None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which this process reads once as long as its size, inode and times stay."""
    with open(path, "rb") as stream:
        stat = os.fstat(stream.fileno())
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if identity not in _digests:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if time.time_ns() - stat.st_ctime_ns < SETTLED_NS:
                return digest
            _digests[identity] = digest
    return _digests[identity]


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
