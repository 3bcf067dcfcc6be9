"""Lock on a run: one job at a time.

Machines that share the run's folder use a lock of the operating system, which a killed job releases. With a bucket,
each machine has such a lock in its local copy, and between machines there is a lease in the bucket: an object that its
holder renews every few seconds. A lease that is no longer renewed, by the clock of the waiting job, has expired.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.files import write_file, write_json
from pipeline.runtime.storage import Storage

POLL_INTERVAL_S = 0.5
LEASE_RENEWAL_S = 10.0
LEASE_EXPIRY_S = 60.0
LEASE_CONFIRM_S = 3.0
"""Delay before a new lease is read again: if two jobs took it at once, the last one holds it."""


@contextmanager
def exclusive_run(
    storage: Storage, folder: Path, say: Callable[[str], None], cancelled: Callable[[], bool]
) -> Iterator[None]:
    """Wait until no other job holds the lock of the run in `folder`, and say so; `cancelled` ends the wait.

    Raises:
        InterruptedError: The wait was cancelled.
    """
    notifier = _WaitNotifier(say, cancelled)
    lock, holder_file = FileLock(folder / "lock"), folder / "holder.txt"
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_INTERVAL_S)
        except Timeout:
            notifier.waiting_for(holder_file.read_text("utf-8") if holder_file.is_file() else "another job")
    try:
        write_file(holder_file, _this_job())
        if storage.is_bucket:
            with _lease(storage, folder / "lease.json", notifier):
                yield
        else:
            yield
    finally:
        lock.release()


class _WaitNotifier:
    """Says once which job this one waits for."""

    def __init__(self, say: Callable[[str], None], cancelled: Callable[[], bool]):
        self._say, self._cancelled, self._notified = say, cancelled, False

    def waiting_for(self, holder: str) -> None:
        if self._cancelled():
            raise InterruptedError("cancelled")
        if not self._notified:
            self._say(f"waiting for {holder}, which holds the run lock")
        self._notified = True


@contextmanager
def _lease(storage: Storage, file: Path, notifier: _WaitNotifier) -> Iterator[None]:
    lease: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "local_copy": _local_copy_id(storage),
        "job": _this_job(),
        "renewed": 0,
    }
    _take(storage, file, lease, notifier)
    released = threading.Event()

    def renew() -> None:
        while not released.wait(LEASE_RENEWAL_S):
            lease["renewed"] += 1
            with suppress(UserError):  # an unreachable bucket is reported by the run's own work
                _write(storage, file, lease)

    renewer = threading.Thread(target=renew, name="lease", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        released.set()
        renewer.join()
        with suppress(UserError):
            storage.remove(file)


def _take(storage: Storage, file: Path, lease: dict[str, Any], notifier: _WaitNotifier) -> None:
    last_lease, changed_at = None, time.monotonic()
    while True:
        current = _read(storage, file)
        if current != last_lease:
            last_lease, changed_at = current, time.monotonic()
        # A job with the same local copy would still hold its lock, which this job holds.
        same_copy = current is not None and current["local_copy"] == lease["local_copy"]
        if current is None or same_copy or time.monotonic() - changed_at >= LEASE_EXPIRY_S:
            _write(storage, file, lease)
            time.sleep(LEASE_CONFIRM_S)
            if (_read(storage, file) or {}).get("id") == lease["id"]:
                return
            continue
        notifier.waiting_for(current["job"])
        time.sleep(POLL_INTERVAL_S)


def _read(storage: Storage, file: Path) -> dict[str, Any] | None:
    try:
        lease: dict[str, Any] = json.loads(storage.read(file))
        return lease
    except FileNotFoundError:
        return None


def _write(storage: Storage, file: Path, lease: dict[str, Any]) -> None:
    write_json(file, lease)
    storage.upload(file)


def _local_copy_id(storage: Storage) -> str:
    """Return the id of this machine's local copy of the bucket."""
    file = storage.folder / ".local-copy"
    with FileLock(storage.folder / ".local-copy.lock"):
        if not file.is_file():
            write_file(file, uuid.uuid4().hex)
        return file.read_text("utf-8")


def _this_job() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"
