"""Lock on a run: one job at a time.

Machines that share the run's folder use a lock of the operating system (flock), which a killed job releases. Where
there is none between the machines, there is a lease: a file of the run, or an object in the bucket, that its holder
renews every few seconds. A lease that is no longer renewed, by the clock of the waiting job, has expired. With a
bucket, each machine also has a lock in its local copy.

The lock saves work; results do not depend on it. A lease is read and then written, so two jobs can hold it at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of flock on a file system without locks, such as Lustre mounted without -o flock."""


@contextmanager
def exclusive_run(
    storage: Storage, folder: Path, say: Callable[[str], None], cancelled: Callable[[], bool]
) -> Iterator[None]:
    """Wait until no other job holds the lock of the run in `folder`, and say so; `cancelled` ends the wait.

    Raises:
        InterruptedError: The wait was cancelled.
    """
    notifier, has_locks = _WaitNotifier(say, cancelled), supports_locks(folder / "lock")
    with ExitStack() as stack:
        if has_locks:
            stack.enter_context(_file_lock(folder, notifier))
        if storage.is_bucket or not has_locks:
            local_copy = _local_copy_id(storage) if has_locks else None
            stack.enter_context(_lease(storage, folder / "lease.json", local_copy, notifier))
        yield


def supports_locks(file: Path) -> bool:
    """Return whether the file system of `file`, which is created, has locks.

    Raises:
        UserError: The file cannot be opened.
    """
    try:
        with open(file, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # another job holds it
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise UserError(
            f"the run cannot be locked: {file}: {error.strerror}; make it writable for you or change `storage`"
        ) from None
    return True


class _WaitNotifier:
    """Says once which job this one waits for."""

    def __init__(self, say: Callable[[str], None], cancelled: Callable[[], bool]):
        self._say, self._cancelled, self._notified = say, cancelled, False

    def waiting_for(self, holder: str, hint: str = "") -> None:
        if self._cancelled():
            raise InterruptedError("cancelled")
        if not self._notified:
            self._say(f"waiting for {holder}, which holds the run lock{hint}")
        self._notified = True


@contextmanager
def _file_lock(folder: Path, notifier: _WaitNotifier) -> Iterator[None]:
    lock, holder_file = FileLock(folder / "lock"), folder / "holder.txt"
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_INTERVAL_S)
        except Timeout:
            notifier.waiting_for(_holder(holder_file))
    try:
        write_file(holder_file, _this_job())
        yield
    finally:
        lock.release()


def _holder(file: Path) -> str:
    with suppress(OSError):
        if text := file.read_text("utf-8", errors="replace"):
            return text
    return "another job"


@contextmanager
def _lease(storage: Storage, file: Path, local_copy: str | None, notifier: _WaitNotifier) -> Iterator[None]:
    """Hold the lease in `file`; `local_copy`: id of the copy of a bucket that this job has locked."""
    lease: dict[str, Any] = {"id": uuid.uuid4().hex, "local_copy": local_copy, "job": _this_job(), "renewed": 0}
    _take(storage, file, lease, notifier)
    released = threading.Event()

    def is_held() -> bool:
        current = _read(storage, file)
        return current is not None and bool(current["id"] == lease["id"])

    def renew() -> None:
        while not released.wait(LEASE_RENEWAL_S):
            with suppress(UserError, OSError):  # an unreachable storage is reported by the run's own work
                if not is_held():  # another job took it while this one was stopped, or at the same time
                    return
                lease["renewed"] += 1
                _write(storage, file, lease)

    renewer = threading.Thread(target=renew, name="lease", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        released.set()
        renewer.join()
        with suppress(UserError, OSError):
            if is_held():
                storage.remove(file)


def _take(storage: Storage, file: Path, lease: dict[str, Any], notifier: _WaitNotifier) -> None:
    last_lease, changed_at = None, time.monotonic()
    while True:
        current = _read(storage, file)
        if current != last_lease:
            last_lease, changed_at = current, time.monotonic()
        # A job with the same local copy would still hold its lock, which this job holds.
        same_copy = current is not None and current["local_copy"] == lease["local_copy"] is not None
        if current is None or same_copy or time.monotonic() - changed_at >= LEASE_EXPIRY_S:
            _write(storage, file, lease)
            time.sleep(LEASE_CONFIRM_S)
            if (_read(storage, file) or {}).get("id") == lease["id"]:
                return
            continue
        notifier.waiting_for(current["job"], f"; if that was killed, this job starts in {LEASE_EXPIRY_S:g} s")
        time.sleep(POLL_INTERVAL_S)


def _read(storage: Storage, file: Path) -> dict[str, Any] | None:
    """Return the lease; a damaged one counts as that of an unknown job, and expires."""
    try:
        content = storage.read(file)
    except FileNotFoundError:
        return None
    with suppress(ValueError, RecursionError):
        lease = json.loads(content)
        if isinstance(lease, dict) and lease.keys() >= {"id", "local_copy", "job"}:
            return lease
    return {"id": content, "local_copy": None, "job": "another job"}


def _write(storage: Storage, file: Path, lease: dict[str, Any]) -> None:
    write_json(file, lease)
    storage.upload(file)


def _local_copy_id(storage: Storage) -> str:
    """Return the id of this machine's local copy of the bucket."""
    file = storage.folder / ".local-copy"
    with FileLock(storage.folder / ".local-copy.lock"):
        with suppress(FileNotFoundError):
            if re.fullmatch("[0-9a-f]{32}", text := file.read_text("utf-8", errors="replace")):
                return text
        write_file(file, text := uuid.uuid4().hex)
        return text


def _this_job() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"
