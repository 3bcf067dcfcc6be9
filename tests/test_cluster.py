"""What a job checks, and says, on a cluster that lacks something."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray
from pipelines import FEW_TASKS, Job
from servers import RayCluster, in_a_mount_namespace

from pipeline.config import ClusterConfig
from pipeline.errors import UserError
from pipeline.runtime.cluster import WorkerResources, check_shared, cluster_summary, connect, num_slots
from pipeline.runtime.storage import Storage

pytestmark = pytest.mark.fault_injection


@pytest.fixture(autouse=True)
def no_shared_ray():
    """These tests join clusters of their own."""
    ray.shutdown()


def test_every_machine_must_see_storage_and_data(tmp_path):
    """And what a training needs must fit on some of them."""
    storage = Storage.from_folder(tmp_path / "storage")
    storage.write_marker()
    cluster = RayCluster(tmp_path, num_cpus=1)
    try:
        cluster.add_node(3, 1)
        config = ClusterConfig(address=cluster.gcs, cpus_per_worker=2)
        worker_resources = connect(config, print)
        assert (worker_resources.cpus, worker_resources.gpus, num_slots(worker_resources)) == (2, 1.0, 1)
        assert [num_slots(WorkerResources(1, gpus)) for gpus in (0, 0.5, 0.4)] == [4, 2, 2]
        assert cluster_summary() == "1 GPUs and 4 CPUs on 2 machines"
        check_shared(storage, [tmp_path])
        with pytest.raises(UserError, match="machine .* does not see /nowhere/data: data.root"):
            check_shared(storage, [Path("/nowhere/data")])
        ray.shutdown()
        for changes, message in (
            ({"cpus_per_worker": 4}, "takes 1 GPU and 4 CPU, but the cluster has 1 GPUs and 4 CPUs on 2 machines"),
            ({"workers_per_training": 2}, "takes 1 GPU and 2 CPU for each of 2 workers"),
            ({"gpus_per_worker": 2}, "takes 2 GPU and 2 CPU, but"),
        ):
            messages = []
            changed = config.model_copy(update=changes | {"wait_for_nodes_s": 3})
            with pytest.raises(UserError, match=message):
                connect(changed, messages.append)
            assert "waiting up to 3 s for machines with" in messages[-1]
            ray.shutdown()

        cluster.add_node(1, 0, prefix=in_a_mount_namespace(storage.folder))
        connect(config, print)
        with pytest.raises(UserError, match="machine 127.0.0.3: .* does not see storage=.*: it must be a folder that"):
            check_shared(storage, [])
    finally:
        ray.shutdown()
        cluster.stop()


def test_waiting_work_reports_missing_resources(new_storage, tmp_path):
    cluster = RayCluster(tmp_path, num_cpus=2, num_gpus=1)
    try:
        ray.init(address=cluster.gcs)

        @ray.remote(num_cpus=0, num_gpus=1)
        def other_work():
            time.sleep(600)

        blocker = other_work.remote()
        while ray.available_resources().get("GPU"):
            time.sleep(0.1)
        options = ("--cluster.address", cluster.gcs, *FEW_TASKS)
        job = Job(new_storage, *options, prefix=("jobs/train_global_prompt.py",))
        try:
            job.wait_until(lambda: "waiting: 'global prompt'" in job.output.read_text())
            ray.cancel(blocker, force=True)
        finally:
            finished = job.finish()
        assert finished.status == 0, finished.output
        assert (
            "waiting: 'global prompt' needs 1 GPU and 1 CPU; the cluster has 1 GPUs and 2 CPUs on 1 machine, "
            "0 GPUs and 2 CPUs of them free: they are in use by other work or"
        ) in finished.output
    finally:
        ray.shutdown()
        cluster.stop()
