"""Everything a run makes, in folders named by the hash of what it was made from.

    <storage>/<stage>/<key>/             finished artefacts of splits, global_prompt, grouping, image_features and
                                         group_trainings
    <storage>/<stage>/.building-<key>/   unfinished ones
    <storage>/runs/<name>-<key>/         reports, by run
    <storage>/benchmarks/<name>-<key>/   reports on many runs

An artefact is built beside its place and renamed into it with artefact.json, which lists its files: a reader sees a
whole artefact or none, and a stage whose artefact is there is not run again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import content_hash
from pipeline.errors import UserError

log = logging.getLogger(__name__)
_MANIFEST = "artefact.json"
_SCRATCH = "checkpoints"


@dataclass(frozen=True)
class Artefact:
    """A stage's output, finished or not; picklable, so that a worker can finish what the driver planned."""

    root: Path
    stage: str
    made_from: dict[str, Any]

    @property
    def key(self) -> str:
        return content_hash(self.made_from)

    @property
    def folder(self) -> Path:
        """Where the finished files lie."""
        return self.root / self.stage / self.key

    @property
    def building(self) -> Path:
        """Where files are made before that."""
        return self.root / self.stage / f".building-{self.key}"

    @property
    def checkpoints(self) -> Path:
        """Scratch folder inside `building`, which is removed on finishing."""
        return self.building / _SCRATCH

    def finished(self) -> bool:
        """True if the artefact is there with all its files; one that lost files is moved aside and told of."""
        if not (self.folder / _MANIFEST).is_file():
            return False
        files = self.manifest()["files"]
        damaged = [name for name, size in files.items() if not _has_size(self.folder / name, size)]
        if not damaged:
            return True
        aside = self.folder.with_name(f".damaged-{self.key}-{uuid.uuid4().hex[:8]}")
        log.warning("%s lost or changed %s; moved to %s, made again", self.folder, ", ".join(damaged), aside)
        os.replace(self.folder, aside)
        return False

    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / _MANIFEST)

    def start(self) -> Path:
        """The folder to make files in; what an interrupted attempt left there stays, to go on from."""
        make_folder(self.building)
        return self.building

    def finish(self, seconds: float) -> None:
        """Publishes the files of `building`, which took `seconds` to make."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for partial in self.building.rglob("*.partial"):  # of a worker that was killed while writing
            partial.unlink(missing_ok=True)
        files = {
            path.relative_to(self.building).as_posix(): path.stat().st_size
            for path in sorted(self.building.rglob("*"))
            if path.is_file() and path.name != _MANIFEST
        }
        manifest = {"stage": self.stage, "made_from": self.made_from, "seconds": seconds, "files": files}
        write_json(self.building / _MANIFEST, manifest)
        try:
            os.replace(self.building, self.folder)
        except OSError:
            if not self.finished():  # else another job was faster with the same content
                raise
            shutil.rmtree(self.building, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Raises: UserError: the disk is full or the folder cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or change `storage`") from error


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; change `storage`") from error
    return path


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
