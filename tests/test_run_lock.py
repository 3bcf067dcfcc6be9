"""One job at a time at a run, also where machines share only a bucket."""

from __future__ import annotations

import json
import threading
import time

import pytest
from servers import S3Server, free_ports

from pipeline.runtime import run_lock
from pipeline.runtime.run_lock import exclusive_run
from pipeline.runtime.storage import Storage


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Gives a machine's view of one storage."""
    server = S3Server(tmp_path, *free_ports(1, start=9700))
    for name, seconds in (("POLL_INTERVAL_S", 0.05), ("LEASE_RENEWAL_S", 0.1), ("LEASE_CONFIRM_S", 0.3)):
        monkeypatch.setattr(run_lock, name, seconds)
    monkeypatch.setattr(run_lock, "LEASE_EXPIRY_S", 1.5)
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
    assert message.startswith("waiting for process ") and message.endswith(", which holds the run lock")


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


def test_waiting_can_be_stopped(tmp_path):
    storage = Storage.from_folder(tmp_path)
    with exclusive_run(storage, folder_of(storage), print, lambda: False):
        with pytest.raises(InterruptedError):
            with exclusive_run(storage, folder_of(storage), print, lambda: True):
                pytest.fail("both are at the run")
