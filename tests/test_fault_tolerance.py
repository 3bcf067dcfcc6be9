"""Fault injection: after each failure the pipeline has the results of an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from breaking import checkpoints, group_checkpoints, same, suspended, without_trainings_of_groups
from mlflow import MlflowClient
from pipelines import FEW_TASKS, Job, every_step_once, prepare, title
from servers import free_ports, mlflow_server

pytestmark = [pytest.mark.fault_injection, pytest.mark.timeout(1200)]


def kill_a_worker(job: Job, label: str) -> None:
    """Kill a worker during the work `label`."""
    while True:
        job.wait_until(lambda: job.workers(label), pause=0)  # splits are written in a tenth of a second
        for worker in job.workers(label):
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
                if title(worker).startswith(f"ray::{label}"):
                    worker.kill()
                    return
                worker.resume()


def kill_the_job(job: Job, condition) -> None:
    """Kill the job with all its processes."""
    try:
        job.wait_until(condition)
    finally:
        job.stop()


def test_workers_are_killed_in_each_stage_and_the_tracking_server_is_away(undisturbed, new_storage, tmp_path):
    (port,) = free_ports(1, start=8700)
    uri = f"http://127.0.0.1:{port}"
    server = mlflow_server(tmp_path, port)
    job = Job(new_storage, *FEW_TASKS, "--tracking.uri", uri)
    try:
        for label in ("check 1", "write "):
            kill_a_worker(job, label)
        job.wait_until(lambda: checkpoints(new_storage, "global_prompt"))  # where it goes on from
        kill_a_worker(job, "global prompt")
        server.kill()
        job.wait_until(lambda: checkpoints(new_storage, "group_trainings"))
        kill_a_worker(job, "each alone")
        with suspended(job):  # the server takes longer to start than the rest of the job
            server = mlflow_server(tmp_path, port)
        kill_a_worker(job, "image features")
        job.wait_until(lambda: group_checkpoints(new_storage))
        kill_a_worker(job, "all in one")
        finished = job.finish()
        assert finished.status == 0, finished.output
        assert "is reachable again" in finished.output
        assert same(new_storage, undisturbed) and every_step_once(new_storage, uri)
        client = MlflowClient(uri)
        runs = client.search_runs([client.get_experiment_by_name("mmap-clip").experiment_id])
        assert {run.info.status for run in runs} == {"FINISHED"}
    finally:
        job.stop()
        server.kill()


def test_the_job_is_killed_in_each_stage(undisturbed, run_job, new_storage):
    for point in (
        "pipeline.stages.splits:write_json",
        "report:global prompt:8",
        "pipeline.stages.grouping_solution:best_partition",
        "report:all in one:8",
        "pipeline.stages.report:to_mlflow_description",
    ):
        job = Job(new_storage, *FEW_TASKS, prefix=("tests/kill_driver.py", point))
        finished = job.finish()
        assert finished.status == -signal.SIGKILL, (point, finished.output)
    finished = run_job("full_pipeline", "--storage", new_storage, *FEW_TASKS)
    assert finished.status == 0, finished.output
    assert finished.output.count("cached (computed in") == 7
    assert same(new_storage, undisturbed) and every_step_once(new_storage)


def test_two_jobs_are_started_on_a_run_with_damaged_checkpoints(undisturbed, new_storage):
    """One is cut, one has a changed byte, one is empty: the one before is used, and told of. The second job waits."""
    job = Job(new_storage, *FEW_TASKS)
    kill_the_job(job, lambda: len(checkpoints(new_storage, "group_trainings", "checkpoint.previous.pt")) > 1)
    damaged = checkpoints(new_storage, "group_trainings")
    for number, file in enumerate(damaged):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes([content, content[:5000], b""][number % 3])
    first_job = Job(new_storage, *FEW_TASKS)
    try:
        first_job.wait_until(lambda: "cached (computed in" in first_job.output.read_text())
        with suspended(first_job):
            second_job = Job(new_storage, *FEW_TASKS)
            second_job.wait_until(lambda: "waiting for process" in second_job.output.read_text())
    finally:
        first_result, second_result = first_job.finish(), second_job.finish()
    assert first_result.status == second_result.status == 0, first_result.output + second_result.output
    for file in damaged:
        assert f"checkpoint {file} is damaged; using the previous one" in first_result.output
    assert (
        f"waiting for process {first_job.process.pid} on {os.uname().nodename}, which holds the run lock"
        in second_result.output
    )
    assert second_result.output.count("cached (computed in") == 7
    assert same(new_storage, undisturbed) and every_step_once(new_storage)


class SmallDisk:
    """A file system in memory, of which all but `free` can be taken away."""

    def __init__(self, folder: Path, size: int):
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self) -> None:
        with open(self._ballast, "wb") as stream:
            while free := shutil.disk_usage(self.folder).free:
                try:
                    os.posix_fallocate(stream.fileno(), stream.seek(0, 2), free)
                except OSError:  # others write too
                    continue

    def free(self) -> None:
        self._ballast.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk", 300 << 20)
    yield disk
    disk.unmount()


def test_the_disk_is_full(undisturbed, run_job, disk, digits):
    """Once while splits are written, once while checkpoints are: a plain message, and the same command goes on."""
    storage = prepare(disk.folder / "storage", digits)
    for condition in (
        lambda: list(storage.glob("splits/.staging-*")),
        lambda: checkpoints(storage, "group_trainings"),
    ):
        job = Job(storage, *FEW_TASKS, logs=disk.folder.parent)
        try:
            job.wait_until(condition)
            disk.fill()
        finally:
            finished = job.finish()
        disk.free()
        assert finished.status == 2, finished.output
        assert "error:" in finished.output and "No space left on device" in finished.output, finished.output
        assert "Traceback" not in finished.output.partition("error:")[2]
    finished = run_job("full_pipeline", "--storage", storage, *FEW_TASKS)
    assert finished.status == 0, finished.output
    assert same(storage, undisturbed) and every_step_once(storage)


def test_two_workers_of_a_training_report_its_error(undisturbed, run_job, tmp_path):
    storage = without_trainings_of_groups(undisturbed, tmp_path / "storage")
    options = (*FEW_TASKS, "--cluster.workers_per_training", "2", "--training.learning_rate", "1e30")
    failed = run_job("train_global_prompt", "--storage", storage, *options)
    assert failed.status == 2 and "error: global prompt: the loss of task" in failed.output, failed.output
