"""Session of a run on the driver: its folder, the cluster, MLflow, progress, the terminal."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.buckets import AnyPath
from pipeline.config import ClusterConfig, TrackingConfig
from pipeline.errors import UserError
from pipeline.files import create_folder, is_uri
from pipeline.runtime.cluster import IN_SUBMITTED_JOB, WorkerResources, check_shared, ray_connection
from pipeline.runtime.progress import RunProgress, run_progress
from pipeline.runtime.run_lock import exclusive_run
from pipeline.runtime.storage import Storage
from pipeline.runtime.tracking.journal import JOURNAL
from pipeline.runtime.tracking.tracker import Tracker, end_status, open_tracker

if TYPE_CHECKING:
    from rich.console import Console

PARENT = "pipeline"
"""Local name of the MLflow parent run."""
MIN_FREE_BYTES = 200 << 20


@dataclass(frozen=True)
class Session:
    """Resources of one run while a job works on it."""

    storage: Storage
    folder: Path
    """The run's folder."""
    cluster: ClusterConfig
    connect: Callable[[], WorkerResources]
    """As of `cluster_connection`."""
    tracker: Tracker
    console: Console
    cancelled: threading.Event
    """Set by another thread to end the run's work."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    announced: set[str] = field(default_factory=set)

    @property
    def worker_resources(self) -> WorkerResources:
        """Resources of one training worker, on the cluster, to which this connects."""
        return self.connect()

    @cached_property
    def progress(self) -> RunProgress:
        """Collector of the workers' reports, on the cluster, to which this connects."""
        self.connect()
        return run_progress(self.say)

    def say(self, text: str) -> None:
        """Print what the user waits for, once."""
        if text not in self.announced:
            self.announced.add(text)
            self.console.print(f"  {text}", markup=False, highlight=False)


@contextmanager
def cluster_connection(
    cluster: ClusterConfig, storage: Storage, paths: Sequence[AnyPath], console: Console, dashboard: bool = False
) -> Iterator[Callable[[], WorkerResources]]:
    """Yield a function that connects to the cluster at its first call, since a job whose results exist needs no Ray; it
    returns the resources of one training worker. At the end, disconnect unless this process was connected before.

    Args:
        paths: files and folders that all machines must see besides the storage.
        dashboard: see `cluster.connect`.

    Raises:
        UserError: In the function: the cluster cannot be reached, or is too small for a training.
    """
    with ExitStack() as connection:

        @cache
        def connect() -> WorkerResources:
            ray = ray_connection(cluster, lambda text: console.print(f"  {text}", highlight=False), dashboard)
            worker_resources = connection.enter_context(ray)
            check_shared(storage, paths)
            return worker_resources

        yield connect


@contextmanager
def open_session(
    storage: Storage,
    folder: Path,
    key: str,
    cluster: ClusterConfig,
    connect: Callable[[], WorkerResources],
    tracking: TrackingConfig,
    console: Console,
    cancelled: threading.Event | None = None,
) -> Iterator[Session]:
    """Hold the lock of the run in `folder`; the MLflow parent run, which the block starts, ends with the block."""
    cancelled = cancelled or threading.Event()

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, highlight=False)

    with exclusive_run(storage, folder, say, cancelled.is_set):
        journal = folder / f"tracking-{key}"
        if storage.is_bucket:  # an earlier job on another machine may have recorded more
            (size,) = storage.sizes([file := journal / JOURNAL])
            if (size or 0) > (file.stat().st_size if file.exists() else 0):
                storage.download(folder)
        tracker = open_tracker(tracking, storage.folder, journal)
        try:
            yield Session(storage, folder, cluster, connect, tracker, console, cancelled)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                say("stopping, and sending the rest to MLflow; a second signal stops at once")
            with suppress(UserError):  # a full disk, which `error` reports
                tracker.end_all(end_status(error))
            tracker.close(timeout_s=20)  # a database that is being created takes its time
            raise
        tracker.end_run(PARENT)
        tracker.end_all("KILLED")  # left by an earlier job that was killed, and not begun again by this one
        tracker.close(timeout_s=20)  # reports what could not be sent
        storage.upload(folder)


def is_below_home(location: str) -> bool:
    """Return whether a storage is below the home folder: a relative one in a submitted job, whose working directory is
    a temporary copy."""
    return IN_SUBMITTED_JOB and not is_uri(location) and not Path(location).expanduser().is_absolute()


def open_storage(location: str, cache: str) -> Storage:
    """Open `config.storage`, with `config.cache` for the local copy of a bucket.

    Raises:
        UserError: The folder or bucket cannot be written, or the disk is nearly full.
    """
    if is_uri(location):
        storage = Storage.from_bucket(location, cache)
        storage.write_marker()
        _check_space("cache", storage.folder.parent)
        return storage
    path = (Path.home() if is_below_home(location) else Path.cwd()) / Path(location).expanduser()
    create_folder(path)
    if not os.access(path, os.W_OK):
        raise UserError(f"storage={path} is not writable: give another folder with --storage")
    _check_space("storage", path)
    storage = Storage.from_folder(path.resolve())
    storage.write_marker()
    return storage


def _check_space(name: str, path: Path) -> None:
    free = shutil.disk_usage(path).free
    if free < MIN_FREE_BYTES:
        raise UserError(
            f"{name}={path} has {free >> 20} MiB free, {MIN_FREE_BYTES >> 20} MiB required: free some space"
        )
