"""Verification of a whole storage: every file of every artifact against its SHA-256, what the runs' folders refer to,
and what interrupted jobs left behind. Nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.config import content_hash
from pipeline.errors import UserError, escape_controls
from pipeline.files import PARTIAL_SUFFIX, DamagedFile, parse_record
from pipeline.runtime.storage import (
    DAMAGED_PREFIX,
    DOWNLOAD_PREFIX,
    HASH_THREADS,
    MANIFEST,
    STAGING_PREFIX,
    STORAGE_MARKER,
    Storage,
    existing_storage,
    read_manifest,
)
from pipeline.stages.finished_run import GROUPING, PROVENANCE, RUNS, SUMMARY

ARTIFACT_KEY = re.compile("[0-9a-f]{16}")
RERUN = "rerun the command that made the run"
RECOMPUTE = "rerun the command that made it: it is recomputed"
LEFTOVERS = {
    STAGING_PREFIX: ("an unfinished attempt", "rerun its command to resume; or remove it, if no job is running"),
    DAMAGED_PREFIX: ("an artifact that was found damaged", "remove it"),
    DOWNLOAD_PREFIX: ("an interrupted download", "remove it, if no job is running"),
}
"""Prefix of a folder → what it is, what to do with it."""


@dataclass(frozen=True)
class Issue:
    """One file or folder that is damaged, missing, or not needed."""

    path: str
    """Relative to the storage."""
    text: str
    remedy: str
    size: int | None = None
    """Bytes; None: unknown, or nothing to remove."""
    is_damage: bool = True


@dataclass
class Verification:
    """Result for a storage; counts are of what was compared."""

    artifacts: int = 0
    files: int = 0
    bytes: int = 0
    issues: list[Issue] = field(default_factory=list)

    @property
    def is_intact(self) -> bool:
        return not any(issue.is_damage for issue in self.issues)

    def add(self, part: Verification) -> None:
        self.artifacts += part.artifacts
        self.files += part.files
        self.bytes += part.bytes
        self.issues += part.issues


def verify_storage(location: str, on_progress: Callable[[int, int, int], None]) -> Verification:
    """Compare all artifacts of a storage, a folder or bucket, with their artifact.json, several files at a time.

    Args:
        on_progress: called with the number of verified artifacts, of all artifacts, and of bytes read.

    Raises:
        UserError: There is no such storage, or the bucket cannot be reached.
    """
    storage = existing_storage(location)
    folders = {entry.name: entry for entry, size in storage.list(storage.folder) if size is None}
    if storage.sizes([storage.folder / STORAGE_MARKER]) == [None] and RUNS not in folders:
        raise UserError(f"storage={location} is not a storage of mmap-clip: give the --storage of a run")
    result, artifacts = Verification(), list[Path]()
    for folder in folders.values():
        entries = storage.list(folder)
        keys = [entry for entry, size in entries if size is None and ARTIFACT_KEY.fullmatch(entry.name)]
        artifacts += keys
        for entry, size in entries:
            if issue := _leftover(storage, entry):
                result.issues.append(issue)
            elif keys and entry not in keys:
                name = entry.relative_to(storage.folder).as_posix()
                size = _folder_size(storage, entry) if size is None else size
                result.issues.append(Issue(name, "not an artifact, never read", "remove it", size, is_damage=False))
    file_threads, threads = ThreadPoolExecutor(HASH_THREADS), ThreadPoolExecutor(HASH_THREADS)
    try:
        for verified in threads.map(lambda artifact: _verify_artifact(storage, artifact, file_threads), artifacts):
            result.add(verified)
            on_progress(result.artifacts, len(artifacts), result.bytes)
    finally:
        for pool in (threads, file_threads):
            pool.shutdown(cancel_futures=True)
    for run, size in storage.list(storage.folder / RUNS):
        if size is None:
            result.issues += _verify_run(storage, run)
    result.issues.sort(key=lambda issue: (not issue.is_damage, issue.path))
    return result


def issue_table(issues: list[Issue]) -> Table:
    """Return the issues as a table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("path", "issue", "MB", "what to do"):
        table.add_column(title, overflow="fold", justify="right" if title == "MB" else "left")
    for issue in issues:
        size = "" if issue.size is None else f"{issue.size / 1e6:,.1f}"
        table.add_row(escape_controls(issue.path), escape_controls(issue.text), size, issue.remedy)
    return table


def _verify_artifact(storage: Storage, folder: Path, threads: ThreadPoolExecutor) -> Verification:
    name, stage = folder.relative_to(storage.folder).as_posix(), folder.parent.name
    result = Verification(artifacts=1)
    content, error_text = _read(storage, folder / MANIFEST)
    if content is None and not error_text:
        # In a bucket, files are there before artifact.json is, and stay if the job is killed.
        text, remedy = f"{MANIFEST} is missing", f"{RECOMPUTE}; or remove it, if no job is running"
        result.issues = [Issue(name, text, remedy, _folder_size(storage, folder), is_damage=not storage.is_bucket)]
        return result
    try:
        files = read_manifest(content or b"", stage, folder.name)
    except ValueError as error:
        result.issues = [Issue(name, error_text or str(error), RECOMPUTE)]
        return result
    sizes = {path.relative_to(folder).as_posix(): size for path, size in storage.list(folder, recursive=True)}
    result.files, result.bytes = len(files), sum(sizes.get(file) or 0 for file in files)

    def compare(file: str) -> str:
        size, digest = files[file]
        if sizes.get(file) is None:
            return "missing"
        if sizes[file] != size:
            return f"{sizes[file]:,} bytes instead of {size:,}"
        try:
            return "" if storage.digest(folder / file) == digest else "changed: another SHA-256"
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"cannot be read: {error}"

    for file, text in zip(files, threads.map(compare, files)):
        if text:
            result.issues.append(Issue(f"{name}/{file}", text, RECOMPUTE))
    for file, size in sizes.items():
        if size is not None and file not in files and file != MANIFEST:
            result.issues.append(
                Issue(f"{name}/{file}", f"not in {MANIFEST}, never read", "remove it", size, is_damage=False)
            )
    return result


def _verify_run(storage: Storage, folder: Path) -> list[Issue]:
    """Return the artifacts that a run refers to and that are missing, and its unreadable and temporary files."""
    name, issues = folder.relative_to(storage.folder).as_posix(), []
    for path, size in storage.list(folder, recursive=True):
        if path.suffix == PARTIAL_SUFFIX:
            text, remedy = "a file that was being written", "remove it, if no job is running"
            issues.append(Issue(path.relative_to(storage.folder).as_posix(), text, remedy, size, is_damage=False))
    records: dict[str, dict[str, Any]] = {}
    for file in (PROVENANCE, SUMMARY, GROUPING):
        content, error_text = _read(storage, folder / file)
        try:
            if content is not None or error_text:  # else its stage has not run
                records[file] = parse_record(content or b"", file)
        except DamagedFile:
            issues.append(Issue(f"{name}/{file}", error_text or "damaged, or of an older version", RERUN))
    provenance = records.get(PROVENANCE, {"sha256_of_files": {}, "snapshots": []})
    for file, digest in provenance["sha256_of_files"].items():
        if _digest(storage, folder / file) != digest:
            issues.append(Issue(f"{name}/{file}", "missing or changed: another SHA-256", RERUN))
    for snapshot in provenance["snapshots"]:
        artifact = f"{snapshot['stage']}/{content_hash(snapshot['inputs'])}"
        if storage.sizes([storage.folder / artifact / MANIFEST]) == [None]:
            issues.append(Issue(name, f"{artifact} is missing", f"needed to add tasks: {RERUN}"))
    return issues


def _read(storage: Storage, path: Path) -> tuple[bytes | None, str]:
    """Return the content of a file and why it cannot be read; None and an empty text: there is no such file."""
    try:
        return storage.read(path), ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cannot be read: {error}"


def _digest(storage: Storage, path: Path) -> str | None:
    try:
        return storage.digest(path)
    except OSError:
        return None


def _leftover(storage: Storage, path: Path) -> Issue | None:
    for prefix, (text, remedy) in LEFTOVERS.items():
        if path.name.startswith(prefix):
            name = path.relative_to(storage.folder).as_posix()
            return Issue(name, text, remedy, _folder_size(storage, path), is_damage=False)
    return None


def _folder_size(storage: Storage, folder: Path) -> int:
    return sum(size or 0 for _, size in storage.list(folder, recursive=True))
