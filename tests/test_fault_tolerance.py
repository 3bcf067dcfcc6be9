"""Fault injection: after each failure the pipeline has the results of an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from breaking import checkpoints, group_checkpoints, same
from mlflow import MlflowClient
from pipelines import FEW_TASKS, Job, every_step_once, prepare, run, summary, title
from servers import free_ports, mlflow_server

from pipeline.files import read_json

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


def test_a_worker_is_killed_in_each_stage(undisturbed, new_storage):
    job = Job(new_storage, *FEW_TASKS)
    try:
        resumed = {
            "global prompt": partial(checkpoints, new_storage, "global_prompt"),
            "each alone": partial(checkpoints, new_storage, "group_trainings"),
            "all in one": partial(group_checkpoints, new_storage),
        }
        for label in ("check 1", "write ", "global prompt", "each alone", "image features", "all in one"):
            if label in resumed:  # where it goes on from
                job.wait_until(resumed[label])
            kill_a_worker(job, label)
    finally:
        finished = job.finish()
    assert finished.status == 0, finished.output
    assert same(new_storage, undisturbed) and every_step_once(new_storage)


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


def test_checkpoints_are_damaged(undisturbed, new_storage):
    """One is cut, one has a changed byte, one is empty: the one before is used, and told of."""
    job = Job(new_storage, *FEW_TASKS)
    kill_the_job(job, lambda: len(checkpoints(new_storage, "group_trainings", "checkpoint.previous.pt")) > 1)
    damaged = checkpoints(new_storage, "group_trainings")
    for number, file in enumerate(damaged):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes([content, content[:5000], b""][number % 3])
    finished = run(new_storage, *FEW_TASKS)
    assert finished.status == 0, finished.output
    for file in damaged:
        assert f"checkpoint {file} is damaged; using the previous one" in finished.output
    assert same(new_storage, undisturbed)


def test_two_jobs_are_started_on_one_run(undisturbed, new_storage):
    first_job = Job(new_storage, *FEW_TASKS)
    try:
        first_job.wait_until(lambda: list((new_storage / "splits").glob("*")))
        first_job.process.send_signal(signal.SIGSTOP)  # until the second one waits
        second_job = Job(new_storage, *FEW_TASKS)
        second_job.wait_until(lambda: "waiting for process" in second_job.output.read_text())
    finally:
        first_job.process.send_signal(signal.SIGCONT)
        first_result, second_result = first_job.finish(), second_job.finish()
    assert first_result.status == second_result.status == 0, first_result.output + second_result.output
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


def test_the_tracking_server_is_away_for_a_while(undisturbed, new_storage, tmp_path):
    (port,) = free_ports(1, start=8700)
    uri = f"http://127.0.0.1:{port}"
    server = mlflow_server(tmp_path, port)
    job = Job(new_storage, *FEW_TASKS, "--tracking.uri", uri)
    try:
        job.wait_until(lambda: checkpoints(new_storage, "global_prompt"))
        server.kill()
        job.wait_until(lambda: checkpoints(new_storage, "group_trainings"))
        server = mlflow_server(tmp_path, port)
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


def test_two_workers_share_each_training(undisturbed, run_job, tmp_path):
    """Data parallel by Ray Train: the numbers of one worker, up to the rounding of another order of sums."""
    two = (*FEW_TASKS, "--cluster.workers_per_training", "2")
    for name in ("storage", "fault"):  # with the splits, and nothing that was trained but each task alone
        shutil.copytree(undisturbed, tmp_path / name)
        trainings = list((tmp_path / name).glob("group_trainings/[!.]*"))
        together = [folder for folder in trainings if len(read_json(folder / "artifact.json")["inputs"]["group"]) > 1]
        assert len(trainings) > len(together) > 1
        for folder in [*together, *(tmp_path / name / stage for stage in ("global_prompt", "image_features", "runs"))]:
            shutil.rmtree(folder)
        (tmp_path / name / "mlflow.db").unlink()
    fault, storage = tmp_path / "fault", tmp_path / "storage"
    failed = run_job("train_global_prompt", "--storage", fault, *two, "--training.learning_rate", "1e30")
    assert failed.status == 2 and "error: global prompt: the loss of task" in failed.output, failed.output

    # One group: on two cores, one training after the other.
    finished = run_job("full_pipeline", "--storage", storage, *two, "--grouping.num_groups", "1")
    assert finished.status == 0, finished.output
    assert every_step_once(storage)
    losses = [
        pq.read_table(next(folder.glob("global_prompt/*/history.parquet")))["loss"].to_numpy()
        for folder in (storage, undisturbed)
    ]
    assert len(losses[0]) == len(losses[1]) and abs(losses[0] - losses[1]).max() < 1e-3
    for method in ("zero_shot", "all_in_one"):
        single, shared = (summary(folder)["methods"][method]["accuracy"] for folder in (undisturbed, storage))
        assert shared == pytest.approx(single, abs=0.01), method  # of 180 images, one may be on the fence
