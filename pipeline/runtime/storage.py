"""Storage of artifacts, in folders named by the hash of their inputs.

    <storage>/<stage>/<key>/             complete artifacts of data_check, splits, global_prompt, task_gradients,
                                         grouping, image_features and group_trainings
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

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import content_hash
from pipeline.errors import UserError
from pipeline.files import (
    FREE_SPACE_ADVICE,
    PARTIAL_SUFFIX,
    create_folder,
    disk_is_full,
    is_uri,
    read_json,
    rename_durably,
    write_file,
    write_json,
)

log = logging.getLogger(__name__)
_MANIFEST = "artifact.json"
_MARKER = ".mmap-storage"
_CHECKPOINTS = "checkpoints"
_SAFE_IN_URI = ":/@%!$&'()*+,;="
"""What `quote` leaves as it is in the URI of a bucket; `#` and spaces belong to a folder's name."""
RETRY_DELAYS_S = (1, 2, 4, 8, 15, 30, 30, 30)
"""Delays between attempts to reach a bucket during a run."""
UPLOAD_THREADS = 8
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
        marker = create_folder(self.folder) / _MARKER
        if not self.is_bucket and marker.is_file():
            return
        write_file(marker, "Storage of mmap-clip: every machine of a cluster must see this file.\n")
        if self.is_bucket:
            filesystem, path = self.filesystem(marker)
            try:
                pafs.copy_files(str(marker), path, pafs.LocalFileSystem(), filesystem)
                filesystem.open_input_file(path).read()
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"storage={self.uri} cannot be used: {error}. Check the name of the bucket, AWS_ENDPOINT_URL (or "
                    "?endpoint_override=), and the credentials in the environment"
                ) from None

    def verify_access(self) -> None:
        """Check that this machine sees the storage. Raises: UserError: It does not."""
        filesystem, marker = self.filesystem(self.folder / _MARKER)
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
        delays = iter(RETRY_DELAYS_S)
        while True:
            try:
                return action()
            except OSError as error:
                if not self.is_bucket:
                    raise
                if (delay := next(delays, None)) is None:
                    raise UserError(
                        f"storage={self.uri} cannot be reached: {error}. Rerun the same command to resume"
                    ) from error
                log.warning("%s: %s; retrying in %d s", self.uri, error, delay)
                time.sleep(delay)


@lru_cache
def open_bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return pyarrow's file system, and the base path in it.

    Raises:
        UserError: pyarrow cannot open the URI, or it holds a password.
    """
    if urlsplit(uri).password:
        raise UserError(
            "a storage URI must not contain credentials, since it is logged: set them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    try:
        path, separator, options = uri.partition("?")
        filesystem, base = pafs.FileSystem.from_uri(f"{quote(path, safe=_SAFE_IN_URI)}{separator}{options}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{uri} is not a storage URI that pyarrow can open (s3://bucket/folder): {error}") from None
    return filesystem, base.rstrip("/")


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
        return self.storage.folder / self.stage / f".staging-{self.key}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which all attempts share; removed on publishing."""
        return self.staging_dir / _CHECKPOINTS

    def is_complete(self) -> bool:
        """Return True if the artifact exists with all its files; a damaged one is moved away, with a warning."""
        if self.storage.sizes([self.folder / _MANIFEST]) == [None]:
            return False
        files = self.manifest()["files"]
        actual_sizes = self.storage.sizes([self.folder / name for name in files])
        damaged = [name for (name, size), actual in zip(files.items(), actual_sizes) if actual != size]
        if not damaged:
            return True
        uri, names = self.storage.display_uri(self.folder), ", ".join(damaged)
        if self.storage.is_bucket:
            log.warning("%s is damaged (%s missing or changed); recomputing it", uri, names)
            self.storage.remove(self.folder / _MANIFEST)
        else:
            moved = self.folder.with_name(f".damaged-{self.key}-{uuid.uuid4().hex[:8]}")
            log.warning("%s is damaged (%s missing or changed); moved to %s, recomputing it", uri, names, moved)
            rename_durably(self.folder, moved)
        return False

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self.storage.read(self.folder / _MANIFEST))
        return manifest

    def download(self) -> Path:
        """Return the complete artifact's folder on this machine, with its files.

        Raises:
            UserError: A file in the bucket is corrupted.
        """
        if not self.storage.is_bucket or (self.folder / _MANIFEST).is_file():
            return self.folder
        partial = create_folder(self.folder.with_name(f".download-{self.key}-{uuid.uuid4().hex[:8]}"))
        try:
            self.storage.download(self.folder, target=partial)
            for name, digest in read_json(partial / _MANIFEST)["sha256"].items():
                if not (partial / name).is_file() or _sha256(partial / name) != digest:
                    uri = self.storage.display_uri(self.folder)
                    raise UserError(f"{uri}/{name} is corrupted (SHA-256 mismatch): remove {uri} and rerun the command")
            _rename_folder(partial, self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.folder

    @contextmanager
    def writer(self, publish: bool = True) -> Iterator[ArtifactWriter]:
        """Yield a staging folder, and publish its files at the end of the block. If another attempt publishes the
        artifact in the meantime, errors of this one are ignored.

        Args:
            publish: False for all but one of several workers in the same attempt.

        Raises:
            UserError: The disk is full.
        """
        started = time.monotonic()
        writer = ArtifactWriter(self, create_folder(self.staging_dir / uuid.uuid4().hex))
        try:
            yield writer
            if publish:
                writer.publish(time.monotonic() - started)
        except Exception as error:
            if self.is_complete():
                log.info("%s was published by another attempt", self.folder)
            elif disk_is_full(error) and not isinstance(error, UserError):
                raise UserError(f"cannot write {self.folder}: {error}; {FREE_SPACE_ADVICE}") from error
            else:
                raise
        finally:
            shutil.rmtree(writer.folder, ignore_errors=True)


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

    def publish(self, seconds: float) -> None:
        """Publish the files of `folder`, which took `seconds` to write."""
        artifact, storage = self.artifact, self.artifact.storage
        for partial in self.folder.rglob(f"*{PARTIAL_SUFFIX}"):  # left by a worker that was killed while writing
            partial.unlink(missing_ok=True)
        local_files = {
            path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()
        }
        files = self.uploaded | {
            name: (path.stat().st_size, _sha256(path))
            for name, path in local_files.items()
            if name not in self.uploaded
        }
        manifest = {
            "stage": artifact.stage,
            "inputs": artifact.inputs,
            "seconds": seconds,
            "files": {name: size for name, (size, _) in sorted(files.items())},
            "sha256": {name: digest for name, (_, digest) in sorted(files.items())},
        }
        storage.upload(self.folder, artifact.folder)
        write_json(self.folder / _MANIFEST, manifest)  # written to the bucket after all else
        storage.upload(self.folder / _MANIFEST, artifact.folder / _MANIFEST)
        if len(local_files) == len(files):  # else other machines wrote parts of it
            _rename_folder(self.folder, artifact.folder)
        storage.remove(artifact.staging_dir)


def upload_part(artifact: Artifact, folder: Path, name: str) -> dict[str, tuple[int, str]]:
    """Upload one file of an artifact from a worker; return its entry in `ArtifactWriter.uploaded`."""
    path, storage = folder / name, artifact.storage
    entry = {name: (path.stat().st_size, _sha256(path))}
    if storage.is_bucket:
        storage.upload(path, artifact.folder / name)
        path.unlink()
    return entry


def _rename_folder(source: Path, target: Path) -> None:
    try:
        rename_durably(source, target)
    except OSError:
        if not (target / _MANIFEST).is_file():  # else another attempt was faster, with the same content
            raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
