"""Storage of artifacts, in folders named by the hash of their inputs.

    <storage>/<stage>/<key>/             complete artifacts of data_check, splits, global_prompt, task_gradients,
                                         single_tasks, grouping, image_features and group_trainings
    <storage>/<stage>/.staging-<key>/    incomplete ones: checkpoints of the training, and a folder for each attempt
    <storage>/runs/<name>-<key>/         reports, by run
    <storage>/benchmarks/<name>-<key>/   reports on several runs
    <storage>/searches/<name>-<key>/     trials of a search, and its report

The storage is a folder that all machines share, or a bucket (s3://, gs://, ...) with a local copy on each machine, in
the same layout, of the files it needs. An artifact is written to a staging folder and published atomically: in a folder
by renaming, in a bucket by writing artifact.json, which lists its files, last. A reader sees a complete artifact or
none, and a stage whose artifact is complete is not run again. Of two attempts at an artifact, the faster publishes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.buckets import ACCESS_ADVICE, open_bucket, with_retries
from pipeline.config import content_hash
from pipeline.errors import UserError
from pipeline.files import (
    PARTIAL_SUFFIX,
    create_folder,
    error_number,
    file_digest,
    is_uri,
    rename_durably,
    to_json,
    write_advice,
    write_file,
    write_json,
)

log = logging.getLogger(__name__)
MANIFEST = "artifact.json"
STAGING_PREFIX, DAMAGED_PREFIX, DOWNLOAD_PREFIX = ".staging-", ".damaged-", ".download-"
RECOMPUTE_ADVICE = "rerun the command that made it, which moves it aside and computes it again"
STORAGE_MARKER = ".mmap-storage"
_CHECKPOINTS = "checkpoints"
UPLOAD_THREADS = 8
HASH_THREADS = 8
MAX_LISTED = 10
CHUNK_BYTES = 8 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """Storage of artifacts and reports; picklable. All paths are below `folder`."""

    uri: str
    """The folder, or the URI of the bucket with a prefix."""
    folder: Path
    """That folder, or this machine's local copy of the bucket; the same path on all machines."""

    @staticmethod
    def from_folder(folder: Path) -> Storage:
        return Storage(str(folder), folder)

    @staticmethod
    def from_bucket(uri: str, cache: str) -> Storage:
        """Return the storage in a bucket; `cache`: folder of the local copies of all buckets."""
        return Storage(uri, _absolute(cache) / content_hash(uri))

    @property
    def is_bucket(self) -> bool:
        return is_uri(self.uri)

    def display_uri(self, path: Path) -> str:
        """Return the path or URI under which a user finds `path`."""
        if not self.is_bucket:
            return str(path)
        base, _, options = self.uri.partition("?")
        name = path.relative_to(self.folder).as_posix()
        return f"{base.rstrip('/')}/{name}" + (f"?{options}" if options else "")

    def write_marker(self) -> None:
        """Write the file that `verify_access` looks for. Raises: UserError: The storage cannot be written or read."""
        marker = create_folder(self.folder) / STORAGE_MARKER
        if not self.is_bucket and marker.is_file():
            return
        write_file(marker, "Storage of mmap-clip: every machine of a cluster must see this file.\n")
        if self.is_bucket:
            filesystem, path = self.filesystem(marker)
            try:
                pafs.copy_files(str(marker), path, pafs.LocalFileSystem(), filesystem)
                filesystem.open_input_file(path).read()
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"storage={self.uri} cannot be used: {error}. {ACCESS_ADVICE}") from None

    def verify_access(self) -> None:
        """Check that this machine sees the storage. Raises: UserError: It does not."""
        filesystem, marker = self.filesystem(self.folder / STORAGE_MARKER)
        try:
            if filesystem.get_file_info(marker).type == pafs.FileType.File:
                return
            reason = ""
        except OSError as error:
            reason = f" ({error})"
        raise UserError(
            f"{os.uname().nodename} does not see storage={self.uri}{reason}: it must be a folder that all machines "
            "mount at the same path, or a bucket that all can reach, with credentials in the environment of each"
        )

    def sizes(self, paths: list[Path]) -> list[int | None]:
        """Return the sizes in bytes of files in the storage; None for a missing one."""
        filesystem, _ = self.filesystem(self.folder)
        names = [self.filesystem(path)[1] for path in paths]
        infos = self._with_retries(lambda: filesystem.get_file_info(names))
        return [info.size if info.type == pafs.FileType.File else None for info in infos]

    def read(self, path: Path) -> bytes:
        """Return a file's content. Raises: FileNotFoundError: There is no such file in the storage."""
        filesystem, name = self.filesystem(path)

        def read_file() -> bytes | None:
            try:
                data: bytes = filesystem.open_input_file(name).read()
                return data
            except FileNotFoundError:
                return None

        if (content := self._with_retries(read_file)) is None:
            raise FileNotFoundError(self.display_uri(path))
        return content

    def list(self, folder: Path, recursive: bool = False) -> list[tuple[Path, int | None]]:
        """Return the entries of a folder, sorted, with the sizes of files in bytes; None for a folder."""
        filesystem, name = self.filesystem(folder)
        selector = pafs.FileSelector(name, allow_not_found=True, recursive=recursive)
        infos = self._with_retries(lambda: filesystem.get_file_info(selector))
        entries = [
            (folder / info.path[len(name) + 1 :], None if info.type == pafs.FileType.Directory else info.size)
            for info in infos
        ]
        return sorted(entries)

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file, read piece by piece. Raises: FileNotFoundError: There is no such file."""
        filesystem, name = self.filesystem(path)

        def read_file() -> str | None:
            digest = hashlib.sha256()
            try:
                with filesystem.open_input_stream(name, buffer_size=None) as stream:
                    while data := stream.read(CHUNK_BYTES):
                        digest.update(data)
            except FileNotFoundError:
                return None
            return digest.hexdigest()

        if (digest := self._with_retries(read_file)) is None:
            raise FileNotFoundError(self.display_uri(path))
        return digest

    def upload(self, path: Path, target: Path | None = None) -> None:
        """Upload a file, or all files of a folder, to the bucket; nothing to do if the storage is a folder."""
        if not self.is_bucket:
            return
        filesystem, root = self.filesystem(target or path)

        def upload_file(file: Path) -> None:
            name = f"{root}/{file.relative_to(path).as_posix()}" if file != path else root
            self._with_retries(lambda: pafs.copy_files(str(file), name, pafs.LocalFileSystem(), filesystem))

        # Other processes may be writing to a run's folder, under temporary names.
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        with ThreadPoolExecutor(UPLOAD_THREADS) as threads:
            list(threads.map(upload_file, [file for file in files if file.suffix != PARTIAL_SUFFIX]))

    def download(self, folder: Path, target: Path | None = None) -> None:
        """Download all files of a folder, if it exists, from the bucket; nothing to do if the storage is a folder."""
        if self.is_bucket:
            filesystem, name = self.filesystem(folder)
            if self._with_retries(lambda: filesystem.get_file_info(name)).type == pafs.FileType.Directory:
                path = str(create_folder(target or folder))
                self._with_retries(lambda: pafs.copy_files(name, path, filesystem, pafs.LocalFileSystem()))

    def remove(self, path: Path) -> None:
        """Remove a file or folder, if it exists, from the storage and the local copy."""
        if self.is_bucket:
            filesystem, name = self.filesystem(path)
            kind = self._with_retries(lambda: filesystem.get_file_info(name)).type
            if kind == pafs.FileType.File:
                self._with_retries(lambda: filesystem.delete_file(name))
            elif kind == pafs.FileType.Directory:
                self._with_retries(lambda: filesystem.delete_dir(name))
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def filesystem(self, path: Path) -> tuple[pafs.FileSystem, str]:
        """Return pyarrow's file system, and the name of `path` in it."""
        name = path.relative_to(self.folder).as_posix()
        filesystem, base = open_bucket(self.uri) if self.is_bucket else (pafs.LocalFileSystem(), self.uri)
        return filesystem, base if name == "." else f"{base}/{name}"

    def _with_retries(self, action: Callable[[], T]) -> T:
        """Retry for two minutes while a bucket is unreachable. Raises: UserError: It still is."""
        return with_retries(action, f"storage={self.uri}") if self.is_bucket else action()


def existing_storage(location: str) -> Storage:
    """Return a storage, a folder or bucket, to be read: nothing is written to it, and no local copy is used.

    Raises:
        UserError: There is no such storage.
    """
    storage = Storage(location, Path("/")) if is_uri(location) else Storage.from_folder(_absolute(location))
    filesystem, base = storage.filesystem(storage.folder)
    try:
        if filesystem.get_file_info(base).type != pafs.FileType.NotFound:
            return storage
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"storage={location} cannot be listed: {error}") from None
    raise UserError(f"storage={location} does not exist: give the --storage of a run")


def _absolute(location: str) -> Path:
    return Path(location).expanduser().absolute()


@dataclass(frozen=True)
class Artifact:
    """Output of a stage, complete or not; picklable, so that a worker can write what the driver planned."""

    storage: Storage
    stage: str
    inputs: dict[str, Any]

    @property
    def key(self) -> str:
        return content_hash(self.inputs)

    @property
    def folder(self) -> Path:
        """Folder of the complete artifact; with a bucket, filled by `download`."""
        return self.storage.folder / self.stage / self.key

    @property
    def staging_dir(self) -> Path:
        """Folder of the incomplete artifact."""
        return self.storage.folder / self.stage / f"{STAGING_PREFIX}{self.key}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which all attempts share; removed on publishing."""
        return self.staging_dir / _CHECKPOINTS

    def is_complete(self) -> bool:
        """Return True if the artifact exists with all its files, unchanged; a damaged one is moved aside, with a
        warning. Of files in a bucket only the sizes are compared: `download` reads their content.

        Raises:
            UserError: A file may not be read, or the artifact not be moved.
        """
        damage = self._find_damage_in_bucket() if self.storage.is_bucket else self._find_damage()
        if damage:
            self._move_aside(damage)
        return damage == ""

    def _find_damage(self, names: Sequence[str] = ()) -> str | None:
        """Return what is wrong with the folder on this machine; None if there is none."""
        try:
            self.folder.stat()
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise _unreadable(error, self.folder.parent) from None
        return find_damage(self.folder, self.stage, self.key, names)

    def _find_damage_in_bucket(self) -> str | None:
        try:
            content = self.storage.read(self.folder / MANIFEST)
        except FileNotFoundError:
            return None
        try:
            files = read_manifest(content, self.stage, self.key)
        except ValueError as error:
            return str(error)
        actual_sizes = self.storage.sizes([self.folder / name for name in files])
        changed = [name for (name, (size, _)), actual in zip(files.items(), actual_sizes) if actual != size]
        return _list_changed(changed)

    def _move_aside(self, damage: str) -> None:
        uri = self.storage.display_uri(self.folder)
        if self.storage.is_bucket:  # whose files may be replaced, but not renamed at once
            self.storage.remove(self.folder / MANIFEST)
            log.warning("%s is damaged (%s); recomputing it", uri, damage)
            return
        moved = self.folder.with_name(f"{DAMAGED_PREFIX}{self.key}-{uuid.uuid4().hex[:8]}")
        try:
            rename_durably(self.folder, moved)
        except FileNotFoundError:  # moved by another job
            return
        except OSError as error:
            raise UserError(
                f"{uri} is damaged ({damage}) and cannot be moved aside: {error.strerror}; {write_advice(error)}"
            ) from None
        log.warning("%s is damaged (%s); moved to %s, recomputing it", uri, damage, moved)

    def download(self, *names: str) -> Path:
        """Return the complete artifact's folder on this machine, after comparing the SHA-256 of its files.

        Args:
            names: files to compare; none: all.

        Raises:
            UserError: A file is missing or changed.
        """
        damage = self._find_damage(names)
        if damage and self.storage.is_bucket:
            log.warning("%s is damaged (%s); downloading it again", self.folder, damage)
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.storage.is_bucket and damage != "":
            self._download()
        elif damage != "":
            raise UserError(f"{self.folder} is damaged ({damage or 'it is missing'}): {RECOMPUTE_ADVICE}")
        return self.folder

    def _download(self) -> None:
        partial = create_folder(self.folder.with_name(f"{DOWNLOAD_PREFIX}{self.key}-{uuid.uuid4().hex[:8]}"))
        try:
            self.storage.download(self.folder, target=partial)
            if damage := find_damage(partial, self.stage, self.key):
                self._move_aside(damage)
                uri = self.storage.display_uri(self.folder)
                raise UserError(f"{uri} is damaged ({damage}): {RECOMPUTE_ADVICE}")
            rename_folder(partial, self)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def writer(self, publish: bool = True) -> Iterator[ArtifactWriter]:
        """Yield a staging folder, and publish its files at the end of the block. If another attempt publishes the
        artifact in the meantime, errors of this one are ignored.

        Args:
            publish: False for all but one of several workers in the same attempt.

        Raises:
            UserError: The disk is full, or the folder cannot be written.
        """
        writer = ArtifactWriter(self, create_folder(self.staging_dir / uuid.uuid4().hex))
        try:
            yield writer
            if publish:
                writer.publish()
        except Exception as error:
            if self.is_complete():
                log.info("%s was published by another attempt", self.folder)
            elif _is_write_error(error, writer.folder) and not isinstance(error, UserError):
                raise UserError(f"cannot write {self.folder}: {error}; {write_advice(error)}") from error
            else:
                raise
        finally:
            shutil.rmtree(writer.folder, ignore_errors=True)


def _is_write_error(error: Exception, folder: Path) -> bool:
    """Return whether an error is one of writing: by its number, or as it names a file in the folder."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or (
        isinstance(error, OSError) and str(error.filename or "").startswith(str(folder))
    )


@dataclass
class ArtifactWriter:
    """One attempt at an artifact."""

    artifact: Artifact
    folder: Path
    uploaded: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Files that `upload_part` has uploaded: name → size in bytes, SHA-256."""

    @property
    def is_repeated(self) -> bool:
        """Whether an earlier attempt was interrupted: its folder or its checkpoints are still there."""
        return any(path != self.folder for path in self.folder.parent.iterdir())

    def publish(self) -> None:
        """Publish the files of `folder`."""
        artifact, storage = self.artifact, self.artifact.storage
        for partial in self.folder.rglob(f"*{PARTIAL_SUFFIX}"):  # left by a worker that was killed while writing
            partial.unlink(missing_ok=True)
        local_files = {
            path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()
        }
        files = self.uploaded | {
            name: (path.stat().st_size, file_digest(path))
            for name, path in local_files.items()
            if name not in self.uploaded
        }
        manifest = {
            "stage": artifact.stage,
            "inputs": artifact.inputs,
            "files": {name: size for name, (size, _) in sorted(files.items())},
            "sha256": {name: digest for name, (_, digest) in sorted(files.items())},
        }
        storage.upload(self.folder, artifact.folder)
        write_json(self.folder / MANIFEST, manifest)  # written to the bucket after all else
        storage.upload(self.folder / MANIFEST, artifact.folder / MANIFEST)
        if len(local_files) == len(files):  # else other machines wrote parts of it
            rename_folder(self.folder, artifact)
        storage.remove(artifact.staging_dir)


def upload_part(artifact: Artifact, folder: Path, name: str) -> dict[str, tuple[int, str]]:
    """Upload one file of an artifact from a worker; return its entry in `ArtifactWriter.uploaded`."""
    path, storage = folder / name, artifact.storage
    entry = {name: (path.stat().st_size, file_digest(path))}
    if storage.is_bucket:
        storage.upload(path, artifact.folder / name)
        path.unlink()
    return entry


def rename_folder(source: Path, artifact: Artifact) -> None:
    """Rename a folder to that of an artifact, unless another attempt was faster, with the same content."""
    try:
        rename_durably(source, artifact.folder)
    except OSError:
        if artifact.folder.exists() and find_damage(artifact.folder, artifact.stage, artifact.key) == "":
            return
        raise


def read_manifest(data: bytes, stage: str, key: str) -> dict[str, tuple[int, str]]:
    """Return the files of an artifact, name → size in bytes and SHA-256, from its artifact.json.

    Raises:
        ValueError: It is damaged, or of another artifact than `stage` and `key` name.
    """
    try:
        values = json.loads(data)
        sizes, digests = dict(values["files"]), dict(values["sha256"])
        is_own = values["stage"] == stage and content_hash(values["inputs"]) == key
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if not is_own or sizes.keys() != digests.keys() or to_json(values).encode() != data:
        raise ValueError(f"{MANIFEST} was changed, or belongs to another artifact")
    return {name: (size, digests[name]) for name, size in sizes.items()}


def find_damage(folder: Path, stage: str, key: str, names: Sequence[str] = ()) -> str:
    """Compare an artifact's files on this machine with its artifact.json; return what differs, "" if nothing does.

    Args:
        names: files to compare; none: all.

    Raises:
        UserError: A file may not be read.
    """
    try:
        files = read_manifest((folder / MANIFEST).read_bytes(), stage, key)
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            compared = list(names or files)
            unchanged = threads.map(lambda name: name in files and _is_unchanged(folder / name, *files[name]), compared)
            changed = [name for name, is_unchanged in zip(compared, unchanged) if not is_unchanged]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except PermissionError as error:
        raise _unreadable(error, folder) from None
    except (ValueError, OSError) as error:
        return str(error)
    return _list_changed(changed)


def _unreadable(error: OSError, folder: Path) -> UserError:
    return UserError(f"{error.filename} cannot be read: {error.strerror}; ask its owner for the right to read {folder}")


def _list_changed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"missing or changed: {', '.join(names[:MAX_LISTED])}{more}" if names else ""


def _is_unchanged(path: Path, size: int, digest: str) -> bool:
    try:
        return path.stat().st_size == size and file_digest(path) == digest
    except PermissionError:
        raise
    except OSError:
        return False
