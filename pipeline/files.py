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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PARTIAL_SUFFIX = ".partial"
"""Suffix of temporary paths."""
_ERROR_NUMBER = re.compile(r"\((?:os )?error (\d+)\)|\[Errno (\d+)\]|\berrno:? (\d+)")
"""How torch, safetensors and pyarrow name the number of an error of the operating system."""
_ADVICE = {
    errno.ENOSPC: "free some disk space or change {option}",
    errno.EDQUOT: "remove files of yours or ask for a larger quota, or change {option}",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user write it (ls -ld, chmod, chown) or change {option}"),
    errno.EROFS: "its file system is mounted read-only: mount it for writing or change {option}",
    errno.EIO: "its disk or network mount fails (dmesg says how): repair it or change {option}",
    errno.ESTALE: "its network file system was lost: mount it again or change {option}",
    errno.ENAMETOOLONG: "give a shorter name or path, with {option} or of the data",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
        "a file and a folder have one name: remove the wrong one or change {option}",
    ),
    errno.ENOENT: "its folder was removed or is not mounted: restore it or change {option}",
}
SETTLED_NS = 2_000_000_000
"""Age of a file's last change from which its digest is remembered: later changes then have other times, whatever the
resolution of the file system's clock."""
_DIGEST = "sha256"
"""Key in a record."""
_digests: dict[tuple[int, ...], str] = {}
"""Digests of this process: device, inode, size and times of a file → SHA-256."""


class DamagedFile(UserError):
    """A stored file that is cut, changed, or of another version."""


def is_uri(location: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def split_location(location: str) -> tuple[str, str]:
    """Return an absolute path, or a URI without its options, and these: `?region=...` or an empty text."""
    if not is_uri(location):
        return os.path.abspath(os.path.expanduser(location)), ""
    path, separator, options = location.partition("?")
    return path.rstrip("/"), separator + options


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
        UserError: as `write_errors`.
    """
    with write_errors(path), atomic_replace(path) as partial:
        yield partial


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Report errors of the operating system, as any library raises them, as a UserError about `path`.

    Raises:
        UserError: the file cannot be written, with the remedy.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or (error_number(error) and not isinstance(error, UserError)):
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write {path}: {reason}; {write_advice(error)}") from error
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
    write_file(path, to_json(value))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Raises: FileNotFoundError: There is no such file. DamagedFile: It is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON; remove it and rerun the command that made it") from None


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its values, which `read_record` compares."""
    write_json(path, {**values, _DIGEST: _values_digest(values)})


def read_record(path: Path) -> dict[str, Any]:
    """Return the values of `write_record`. Raises: FileNotFoundError: There is no such file. DamagedFile: It was
    changed."""
    return parse_record(path.read_bytes(), path)


def parse_record(data: bytes, name: Path | str) -> dict[str, Any]:
    """Return the values in the content of a file of `write_record`. Raises: DamagedFile: It was changed."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        values: dict[str, Any] = json.loads(data)
        is_whole = to_json(values).encode() == data
        if values.pop(_DIGEST, "") == _values_digest(values) and is_whole:
            return values
    raise DamagedFile(f"{name} is damaged, or of an older version: rerun the command that made it")


def _values_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(values).encode()).hexdigest()


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read some or all columns of a Parquet file. `pyarrow.parquet.read_table` imports pandas first, which takes half a
    second."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(None if columns is None else list(columns))


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


def file_digests(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by its path in it."""
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def create_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; {write_advice(error)}") from error
    return path


def error_number(error: BaseException) -> int | None:
    """Return the number of an error of the operating system; of torch, safetensors and pyarrow, from its message."""
    if (number := getattr(error, "errno", None)) is not None:
        return int(number)
    if match := _ERROR_NUMBER.search(str(error)):
        return int(next(filter(None, match.groups())))
    return next((number for number in (errno.ENOSPC, errno.EDQUOT) if os.strerror(number) in str(error)), None)


def write_advice(error: BaseException, option: str = "`storage`") -> str:
    """Return the remedy for an error of writing below the folder that `option` names."""
    advice = _ADVICE.get(error_number(error) or 0, "check its disk or change {option}").format(option=option)
    return f"{advice}, then rerun the same command"
