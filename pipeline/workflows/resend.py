"""Sending what the runs of a storage still have for MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import is_uri, split_location
from pipeline.runtime.run_lock import exclusive_run
from pipeline.runtime.storage import Storage
from pipeline.runtime.tracking.delivery import DeliveryReport
from pipeline.runtime.tracking.journal import JOURNAL
from pipeline.runtime.tracking.mlflow_adapter import check_reachable, resolve_tracking_uri
from pipeline.runtime.tracking.tracker import open_tracker, read_target

BENCHMARKS = "benchmarks"
KINDS = ("runs", BENCHMARKS, "searches")
"""Folders of a storage whose folders have journals."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Resent:
    """Outcome for one run, benchmark or search."""

    uri: str
    report: DeliveryReport | None
    """None: a job is at work on it, and sends its operations itself."""


def resend(
    source: str, cache: str, uri: str | None, experiment: str | None, say: Callable[[str], None]
) -> Iterator[Resent]:
    """Send what waits and what was refused, of a run or of all of a storage; runs whose job was killed end as KILLED.

    Args:
        uri: tracking URI; None: the one that each run was sent to.
        experiment: likewise.

    Raises:
        UserError: There is no such run or storage, or MLflow cannot be used.
    """
    storage, folders = _find_folders(source, cache)
    checked: set[str] = set()
    for folder in folders:
        storage.download(folder)
        for journal in sorted(path.parent for path in folder.glob(f"tracking*/{JOURNAL}")):
            tracking = read_target(storage.folder, journal)
            changes = {"uri": uri or tracking.uri, "experiment": experiment or tracking.experiment}
            tracking = tracking.model_copy(update=changes)
            target = resolve_tracking_uri(tracking.uri, storage.folder)
            if target not in checked:
                check_reachable(target)
                checked.add(target)
            try:
                with exclusive_run(storage, journal if folder.parent.name == BENCHMARKS else folder, say, lambda: True):
                    tracker = open_tracker(tracking, storage.folder, journal, retry_refused=True)
                    tracker.end_all("KILLED")
                    report: DeliveryReport | None = tracker.close(TIMEOUT_S)
                    storage.upload(journal)
            except InterruptedError:
                report = None
            yield Resent(storage.display_uri(folder), report)


def _find_folders(source: str, cache: str) -> tuple[Storage, list[Path]]:
    path, options = split_location(source)

    def storage_at(root: str) -> Storage:
        return Storage.from_bucket(root + options, cache) if is_uri(root) else Storage.from_folder(Path(root))

    root, _, kind = path.rpartition("/")[0].rpartition("/")
    if kind in KINDS and _is_storage(storage := storage_at(root)):
        folder = storage.folder / kind / path.rpartition("/")[2]
        if _subfolders(storage, folder):
            return storage, [folder]
    elif _is_storage(storage := storage_at(path)):
        return storage, [folder for kind in KINDS for folder in _subfolders(storage, storage.folder / kind)]
    raise UserError(f"{source} is neither a storage nor a run of one: give <storage> or <storage>/runs/<run>")


def _subfolders(storage: Storage, folder: Path) -> list[Path]:
    """Return the folders below `folder` in the storage; of a run, those with its journals."""
    return [entry for entry, size in storage.list(folder) if size is None]


def _is_storage(storage: Storage) -> bool:
    try:
        storage.verify_access()
        return True
    except UserError:
        return False
