"""One job at a time at a run, also where machines share only a bucket."""

from __future__ import annotations

import errno
import json
import os
import threading
import time

import pytest
from servers import S3Server, free_ports

from pipeline.errors import UserError
from pipeline.runtime import run_lock
from pipeline.runtime.run_lock import exclusive_run
from pipeline.runtime.storage import Artifact, Storage
from pipeline.runtime.tracking.journal import Journal


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Gives a machine's view of one storage."""
    server = S3Server(tmp_path, *free_ports(1, start=9700))
    for name, seconds in (("POLL_INTERVAL_S", 0.05), ("LEASE_RENEWAL_S", 0.1), ("LEASE_CONFIRM_S", 0.3)):
        monkeypatch.setattr(run_lock, name, seconds)
    monkeypatch.setattr(run_lock, "LEASE_EXPIRY_S", 3)
    base, options = server.uri.split("?")
    yield lambda machine: Storage(f"{base}/storage?{options}", tmp_path / machine)
    server.kill()


def folder_of(storage):
    folder = storage.folder / "runs" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def work(storage, log, name, seconds=0.7):
    with exclusive_run(storage, folder_of(storage), lambda text: log.append(text), lambda: False):
        log.append(f"{name} begins")
        time.sleep(seconds)
        log.append(f"{name} ends")


@pytest.mark.parametrize("machines", [("one", "one"), ("one", "other")])
def test_of_concurrent_jobs_one_waits(bucket, machines):
    log: list[str] = []
    jobs = [
        threading.Thread(target=work, args=(bucket(machine), log, str(index))) for index, machine in enumerate(machines)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    events = [entry for entry in log if "waiting" not in entry]
    earlier, later = events[0][0], events[2][0]
    assert events == [f"{earlier} begins", f"{earlier} ends", f"{later} begins", f"{later} ends"] and earlier != later


def test_a_later_job_waits_with_a_message(bucket):
    log: list[str] = []
    earlier = threading.Thread(target=work, args=(bucket("one"), log, "first", 2.5))
    earlier.start()
    while not log:
        time.sleep(0.05)
    work(bucket("other"), log, "second")
    earlier.join()
    assert [entry for entry in log if "waiting" not in entry][1:3] == ["first ends", "second begins"]
    (message,) = [entry for entry in log if "waiting" in entry]
    assert message.startswith("waiting for process ") and "; if that was killed, this job starts in " in message


@pytest.mark.parametrize("machine, immediate", [("same", True), ("other", False)])
def test_a_lease_of_a_killed_job_is_taken_over(bucket, machine, immediate):
    lost = bucket("same")
    file = folder_of(lost) / "lease.json"
    file.write_text(json.dumps({"id": "lost", "local_copy": run_lock._local_copy_id(lost), "job": "it", "renewed": 3}))
    lost.upload(file)
    log: list[str] = []
    work(bucket(machine), log, "next", 0)
    assert log[-2:] == ["next begins", "next ends"]
    assert ("waiting" in log[0]) != immediate
    with pytest.raises(FileNotFoundError):
        lost.read(file)


def test_a_file_system_without_locks_has_a_lease(tmp_path, monkeypatch):
    """Such as Lustre without -o flock: of two jobs one waits, and one that was killed elsewhere is not waited for."""
    numbers = [errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP]

    def refuse(*_):
        number = numbers.pop(0) if numbers else errno.ENOLCK
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match="lock: Permission denied; make it writable"):
        run_lock.supports_locks(tmp_path / "lock")
    assert not run_lock.supports_locks(tmp_path / "lock") and not run_lock.supports_locks(tmp_path / "lock")
    for name, seconds in (("POLL_INTERVAL_S", 0.02), ("LEASE_RENEWAL_S", 0.05), ("LEASE_CONFIRM_S", 0.1)):
        monkeypatch.setattr(run_lock, name, seconds)
    monkeypatch.setattr(run_lock, "LEASE_EXPIRY_S", 0.5)
    storage, log = Storage.from_folder(tmp_path), list[str]()
    lease = folder_of(storage) / "lease.json"
    lease.write_text(json.dumps({"id": "lost", "local_copy": None, "job": "process 7 on lost", "renewed": 3}))
    jobs = [threading.Thread(target=work, args=(storage, log, str(index), 0.7)) for index in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert "process 7 on lost" in log[0] and "starts in 0.5 s" in log[0]
    events = [entry for entry in log if "waiting" not in entry]
    assert [event.split()[1] for event in events] == ["begins", "ends"] * 2
    assert not lease.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"id": 1}', b"\xff"])
def test_damaged_leases_and_names_of_holders_are_mended(content, tmp_path, monkeypatch):
    for name, seconds in (("POLL_INTERVAL_S", 0.02), ("LEASE_CONFIRM_S", 0), ("LEASE_EXPIRY_S", 0.1)):
        monkeypatch.setattr(run_lock, name, seconds)
    storage, log = Storage.from_folder(tmp_path), list[str]()
    folder = folder_of(storage)
    (tmp_path / ".local-copy").write_bytes(content)
    assert len(run_lock._local_copy_id(storage)) == 32
    with run_lock._file_lock(folder, run_lock._WaitNotifier(log.append, lambda: False)):
        (folder / "holder.txt").write_bytes(content)
        stopped = iter([False, True])
        with pytest.raises(InterruptedError):
            with exclusive_run(storage, folder, log.append, lambda: next(stopped)):
                pytest.fail("both are at the run")
    assert log[0].startswith("waiting for ")
    monkeypatch.setattr(run_lock, "supports_locks", lambda file: False)
    (folder / "lease.json").write_bytes(content)
    work(storage, log, "next", 0)
    assert log[-2:] == ["next begins", "next ends"]


def test_results_and_journals_of_two_holders_at_once_are_complete(bucket, monkeypatch):
    """Correctness does not depend on the lease: what both write is equal, or whole."""
    monkeypatch.setattr(run_lock, "_take", lambda storage, file, lease, notifier: run_lock._write(storage, file, lease))
    at_work, failures = threading.Barrier(2), list[BaseException]()

    def job(machine: str) -> None:
        storage = bucket(machine)
        folder, artifact = folder_of(storage), Artifact(storage, "splits", {"seed": 1})
        try:
            with exclusive_run(storage, folder, print, lambda: False):
                at_work.wait(30)
                with artifact.writer() as writer:
                    at_work.wait(30)
                    (writer.folder / "content.txt").write_text("content")
                journal = Journal(folder / "tracking-0")
                for number in range(6):
                    journal.record("start", f"run {number}", {"parent": None})
                    storage.upload(folder)
                journal.close()
                assert artifact.is_complete() and (artifact.download() / "content.txt").read_text() == "content"
        except BaseException as error:
            failures.append(error)

    jobs = [threading.Thread(target=job, args=(machine,)) for machine in ("one", "other")]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(60)
    assert not failures
    later = bucket("later")
    later.download(folder_of(later))
    journal = Journal(folder_of(later) / "tracking-0")
    assert [op.run for op in journal.operations] == [f"run {number}" for number in range(6)]
    journal.close()
    assert Artifact(later, "splits", {"seed": 1}).is_complete()


def test_a_lease_that_another_job_took_is_left_to_it(bucket):
    storage = bucket("one")
    file = folder_of(storage) / "lease.json"
    newer_lease = {"id": "other", "local_copy": None, "job": "process 7 on other", "renewed": 0}
    with exclusive_run(storage, file.parent, print, lambda: False):
        run_lock._write(storage, file, newer_lease)
        time.sleep(0.5)  # several renewals
        assert run_lock._read(storage, file) == newer_lease
    assert run_lock._read(storage, file) == newer_lease


def test_waiting_can_be_stopped(tmp_path):
    storage = Storage.from_folder(tmp_path)
    with exclusive_run(storage, folder_of(storage), print, lambda: False):
        with pytest.raises(InterruptedError):
            with exclusive_run(storage, folder_of(storage), print, lambda: True):
                pytest.fail("both are at the run")
