"""Everything a run makes, in folders named by the hash of what it was made from.

    <storage>/<stage>/<key>/             finished artifacts of data_check, splits, global_prompt, task_gradients,
                                         grouping, image_features and group_trainings
    <storage>/<stage>/.building-<key>/   unfinished ones: the training's checkpoints, and a folder for each attempt
    <storage>/runs/<name>-<key>/         reports, by run
    <storage>/benchmarks/<name>-<key>/   reports on many runs
    <storage>/searches/<name>-<key>/     trials of a search, and the report on them

The storage is a folder that all machines share, or a bucket (s3://, gs://, ...), of which each machine keeps copies of
what it needs in the same layout. An artifact is made in a folder of its own and published whole: in a folder by
renaming, in a bucket by writing artifact.json, which lists its files, last. A reader sees a whole artifact or none, and
a stage whose artifact is there is not run again. Two that make the same artifact do not meet: the faster one publishes.
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
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import content_hash
from pipeline.errors import UserError
from pipeline.files import (
    FREE_SPACE_ADVICE,
    PARTIAL_SUFFIX,
    create_folder,
    disk_is_full,
    read_json,
    rename_durably,
    write_file,
    write_json,
)

log = logging.getLogger(__name__)
_MANIFEST = "artifact.json"
_MARKER = ".mmap-storage"
_CHECKPOINTS = "checkpoints"
RETRY_DELAYS_S = (1, 2, 4, 8, 15, 30, 30, 30)
"""Between the attempts to reach a bucket while a run is at work."""
UPLOAD_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """A place for artifacts and reports; picklable. Paths are always those below `folder`."""

    uri: str
    """The folder, or where the bucket's part begins."""
    folder: Path
    """Here: that folder, or this machine's copies; the same path on all machines."""

    @staticmethod
    def from_folder(folder: Path) -> Storage:
        return Storage(str(folder), folder)

    @property
    def is_bucket(self) -> bool:
        return is_uri(self.uri)

    def display_uri(self, path: Path) -> str:
        """Where a user finds what has this path."""
        if not self.is_bucket:
            return str(path)
        place, _, options = self.uri.partition("?")
        name = path.relative_to(self.folder).as_posix()
        return f"{place.rstrip('/')}/{name}" + (f"?{options}" if options else "")

    def write_marker(self) -> None:
        """Leaves what `verify_access` looks for. Raises: UserError: the storage cannot be written or read."""
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
                    f"storage={self.uri} cannot be used: {error}. Check the bucket's name, AWS_ENDPOINT_URL (or "
                    "?endpoint_override=), and the credentials, which come from the environment"
                ) from None

    def verify_access(self) -> None:
        """Raises: UserError: this machine does not see the storage."""
        filesystem, marker = self.filesystem(self.folder / _MARKER)
        try:
            if filesystem.get_file_info(marker).type == pafs.FileType.File:
                return
            why = ""
        except OSError as error:
            why = f" ({error})"
        raise UserError(
            f"{os.uname().nodename} does not see storage={self.uri}{why}: it must be a folder that all machines share "
            "under the same path, or a bucket that all can reach, with credentials in the environment of each"
        )

    def sizes(self, paths: list[Path]) -> list[int | None]:
        """Bytes of the files at `paths` in the storage; None for one that is not there."""
        filesystem, _ = self.filesystem(self.folder)
        places = [self.filesystem(path)[1] for path in paths]
        found = self._with_retries(lambda: filesystem.get_file_info(places))
        return [info.size if info.type == pafs.FileType.File else None for info in found]

    def read(self, path: Path) -> bytes:
        """Raises: FileNotFoundError: there is no such file in the storage."""
        filesystem, place = self.filesystem(path)

        def content() -> bytes | None:
            try:
                whole: bytes = filesystem.open_input_file(place).read()
                return whole
            except FileNotFoundError:
                return None

        if (found := self._with_retries(content)) is None:
            raise FileNotFoundError(self.display_uri(path))
        return found

    def upload(self, path: Path, to: Path | None = None) -> None:
        """To the bucket: a file, or all files of a folder. A storage that is a folder has them already."""
        if not self.is_bucket:
            return
        filesystem, place = self.filesystem(to or path)

        def upload_file(file: Path) -> None:
            target = f"{place}/{file.relative_to(path).as_posix()}" if file != path else place
            self._with_retries(lambda: pafs.copy_files(str(file), target, pafs.LocalFileSystem(), filesystem))

        # Of a run's folder, others may just be writing files: those have passing names.
        found = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        with ThreadPoolExecutor(UPLOAD_THREADS) as threads:
            list(threads.map(upload_file, [file for file in found if file.suffix != PARTIAL_SUFFIX]))

    def download(self, folder: Path, into: Path | None = None) -> None:
        """From the bucket: all files of a folder that may be there. A storage that is a folder has them already."""
        if self.is_bucket:
            filesystem, place = self.filesystem(folder)
            if self._with_retries(lambda: filesystem.get_file_info(place)).type == pafs.FileType.Directory:
                target = str(create_folder(into or folder))
                self._with_retries(lambda: pafs.copy_files(place, target, filesystem, pafs.LocalFileSystem()))

    def remove(self, path: Path) -> None:
        """From the bucket, a file or folder that may be there; here too."""
        if self.is_bucket:
            filesystem, place = self.filesystem(path)
            kind = self._with_retries(lambda: filesystem.get_file_info(place)).type
            if kind == pafs.FileType.File:
                self._with_retries(lambda: filesystem.delete_file(place))
            elif kind == pafs.FileType.Directory:
                self._with_retries(lambda: filesystem.delete_dir(place))
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def filesystem(self, path: Path) -> tuple[pafs.FileSystem, str]:
        """pyarrow's file system, and the place in it that has this path."""
        name = path.relative_to(self.folder).as_posix()
        filesystem, base = open_bucket(self.uri) if self.is_bucket else (pafs.LocalFileSystem(), self.uri)
        return filesystem, base if name == "." else f"{base}/{name}"

    def _with_retries(self, action: Callable[[], T]) -> T:
        """A bucket that is away for a minute or two ends nothing. Raises: UserError: for longer."""
        pauses = iter(RETRY_DELAYS_S)
        while True:
            try:
                return action()
            except OSError as error:
                if not self.is_bucket:
                    raise
                if (pause := next(pauses, None)) is None:
                    raise UserError(
                        f"storage={self.uri} cannot be reached: {error}; the same command goes on when it is back"
                    ) from error
                log.warning("%s: %s; trying again in %d s", self.uri, error, pause)
                time.sleep(pause)


def is_uri(place: str) -> bool:
    return "://" in place


@lru_cache
def open_bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system, and the place in it.

    Raises:
        UserError: no URI that pyarrow can open, or one with a password in it.
    """
    if urlsplit(uri).password:
        raise UserError(
            "a URI must not hold credentials, since it is shown and stored: give them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    try:
        filesystem, base = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{uri} is no place like s3://bucket/folder that pyarrow can open: {error}") from None
    return filesystem, base.rstrip("/")


@dataclass(frozen=True)
class Artifact:
    """A stage's output, finished or not; picklable, so that a worker can finish what the driver planned."""

    storage: Storage
    stage: str
    inputs: dict[str, Any]

    @property
    def key(self) -> str:
        return content_hash(self.inputs)

    @property
    def folder(self) -> Path:
        """Where the finished files lie; on this machine, once `local` was asked for."""
        return self.storage.folder / self.stage / self.key

    @property
    def staging_dir(self) -> Path:
        """Where files are made before that."""
        return self.storage.folder / self.stage / f".building-{self.key}"

    @property
    def checkpoints(self) -> Path:
        """Folder of what all attempts share, to go on from; removed on finishing."""
        return self.staging_dir / _CHECKPOINTS

    def is_complete(self) -> bool:
        """True if the artifact is there with all its files; one that lost files is set aside and told of."""
        if self.storage.sizes([self.folder / _MANIFEST]) == [None]:
            return False
        files = self.manifest()["files"]
        found = self.storage.sizes([self.folder / name for name in files])
        damaged = [name for (name, size), there in zip(files.items(), found) if there != size]
        if not damaged:
            return True
        place, told = self.storage.display_uri(self.folder), ", ".join(damaged)
        if self.storage.is_bucket:
            log.warning("%s lost or changed %s; made again", place, told)
            self.storage.remove(self.folder / _MANIFEST)
        else:
            aside = self.folder.with_name(f".damaged-{self.key}-{uuid.uuid4().hex[:8]}")
            log.warning("%s lost or changed %s; moved to %s, made again", place, told, aside)
            rename_durably(self.folder, aside)
        return False

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self.storage.read(self.folder / _MANIFEST))
        return manifest

    def download(self) -> Path:
        """The finished artifact's folder on this machine, with its files.

        Raises:
            UserError: a file of the bucket is not what was written there.
        """
        if not self.storage.is_bucket or (self.folder / _MANIFEST).is_file():
            return self.folder
        arriving = create_folder(self.folder.with_name(f".arriving-{self.key}-{uuid.uuid4().hex[:8]}"))
        try:
            self.storage.download(self.folder, into=arriving)
            for name, digest in read_json(arriving / _MANIFEST)["sha256"].items():
                if not (arriving / name).is_file() or _sha256(arriving / name) != digest:
                    place = self.storage.display_uri(self.folder)
                    raise UserError(f"{place}/{name} is not what was written there: remove {place} and run again")
            _rename_folder(arriving, self.folder)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
        return self.folder

    @contextmanager
    def writer(self, publish: bool = True) -> Iterator[ArtifactWriter]:
        """Gives a folder to make the files in, and publishes them at the end of the block. If another attempt publishes
        the artifact in the meantime, a fault of this one does not matter.

        Args:
            publish: False for all but one of several workers at the same attempt.

        Raises:
            UserError: the disk is full.
        """
        began = time.monotonic()
        writer = ArtifactWriter(self, create_folder(self.staging_dir / uuid.uuid4().hex))
        try:
            yield writer
            if publish:
                writer.publish(time.monotonic() - began)
        except Exception as error:
            if self.is_complete():
                log.info("%s was finished by another", self.folder)
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
    """Files that `upload_part` has taken care of: name → bytes, SHA-256."""

    def publish(self, seconds: float) -> None:
        """Publishes the files of `folder`, which took `seconds` to make."""
        artifact, storage = self.artifact, self.artifact.storage
        for partial in self.folder.rglob(f"*{PARTIAL_SUFFIX}"):  # of a worker that was killed while writing
            partial.unlink(missing_ok=True)
        here = {
            path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()
        }
        of_files = self.uploaded | {
            name: (path.stat().st_size, _sha256(path)) for name, path in here.items() if name not in self.uploaded
        }
        manifest = {
            "stage": artifact.stage,
            "inputs": artifact.inputs,
            "seconds": seconds,
            "files": {name: size for name, (size, _) in sorted(of_files.items())},
            "sha256": {name: digest for name, (_, digest) in sorted(of_files.items())},
        }
        storage.upload(self.folder, artifact.folder)
        write_json(self.folder / _MANIFEST, manifest)  # which is to be in the bucket when all else is
        storage.upload(self.folder / _MANIFEST, artifact.folder / _MANIFEST)
        if len(here) == len(of_files):  # else parts of it were made on other machines
            _rename_folder(self.folder, artifact.folder)
        storage.remove(artifact.staging_dir)


def upload_part(artifact: Artifact, folder: Path, name: str) -> dict[str, tuple[int, str]]:
    """For a worker that makes one file of an artifact, in the Making's `folder`: what belongs into its `uploaded`."""
    path, storage = folder / name, artifact.storage
    described = {name: (path.stat().st_size, _sha256(path))}
    if storage.is_bucket:
        storage.upload(path, artifact.folder / name)
        path.unlink()
    return described


def _rename_folder(source: Path, target: Path) -> None:
    try:
        rename_durably(source, target)
    except OSError:
        if not (target / _MANIFEST).is_file():  # else another was faster with the same content
            raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
