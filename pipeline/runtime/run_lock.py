"""One job at a time at a run.

On machines that share the run's folder it is a lock of the operating system, which a killed job gives back. With a
bucket, each machine has such a lock in its own copies, and between machines there is a lease in the bucket: an object
that its holder changes every few seconds. One that no longer changes, by the clock of whoever watches it, is free.
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
"""Until it is read again who holds a lease that was free: of two that took it at once, the last."""


@contextmanager
def exclusive_run(
    storage: Storage, folder: Path, say: Callable[[str], None], stopped: Callable[[], bool]
) -> Iterator[None]:
    """Waits until no other job is at the run in `folder`, and says so; `stopped` ends the waiting.

    Raises:
        InterruptedError: told to stop.
    """
    told = _WaitNotifier(say, stopped)
    lock, name = FileLock(folder / "lock"), folder / "at_work.txt"
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_INTERVAL_S)
        except Timeout:
            told.waiting_for(name.read_text("utf-8") if name.is_file() else "another job")
    try:
        write_file(name, _this_job())
        if storage.is_bucket:
            with _lease(storage, folder / "lease.json", told):
                yield
        else:
            yield
    finally:
        lock.release()


class _WaitNotifier:
    """Says once for whom this job waits."""

    def __init__(self, say: Callable[[str], None], stopped: Callable[[], bool]):
        self._say, self._stopped, self._done = say, stopped, False

    def waiting_for(self, other: str) -> None:
        if self._stopped():
            raise InterruptedError("told to stop")
        if not self._done:
            self._say(f"waiting: {other} is at this run; then this job goes on")
        self._done = True


@contextmanager
def _lease(storage: Storage, file: Path, told: _WaitNotifier) -> Iterator[None]:
    lease: dict[str, Any] = {"id": uuid.uuid4().hex, "copies": _id_of_copies(storage), "job": _this_job(), "renewed": 0}
    _take(storage, file, lease, told)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_RENEWAL_S):
            lease["renewed"] += 1
            with suppress(UserError):  # a bucket that is away is for the run's own work to tell
                _write(storage, file, lease)

    renewing = threading.Thread(target=renew, name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(UserError):
            storage.remove(file)


def _take(storage: Storage, file: Path, lease: dict[str, Any], told: _WaitNotifier) -> None:
    seen, since = None, time.monotonic()
    while True:
        found = _read(storage, file)
        if found != seen:
            seen, since = found, time.monotonic()
        # Whoever had the same copies would still have their lock, which this job has.
        if found is None or found["copies"] == lease["copies"] or time.monotonic() - since >= LEASE_EXPIRY_S:
            _write(storage, file, lease)
            time.sleep(LEASE_CONFIRM_S)
            if (_read(storage, file) or {}).get("id") == lease["id"]:
                return
            continue
        told.waiting_for(found["job"])
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


def _id_of_copies(storage: Storage) -> str:
    """Of this machine's copies of the bucket."""
    file = storage.folder / ".copies"
    with FileLock(storage.folder / ".copies.lock"):
        if not file.is_file():
            write_file(file, uuid.uuid4().hex)
        return file.read_text("utf-8")


def _this_job() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"
