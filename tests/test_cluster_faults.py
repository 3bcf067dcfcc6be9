"""Machines that are lost and differ: afterwards the pipeline has the numbers of a quiet run."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from breaking import checkpoints, group_checkpoints, lost, same
from pipelines import FEW_TASKS, Job, every_step_once, run, title
from servers import RayCluster, S3Server, Server, free_ports, in_a_mount_namespace

pytestmark = [pytest.mark.fault_injection, pytest.mark.timeout(1200)]


def checkpoints_in(bucket: str) -> list[str]:
    """Checkpoints of group trainings."""
    filesystem, path = pafs.FileSystem.from_uri(bucket)
    infos = filesystem.get_file_info(
        pafs.FileSelector(f"{path}/runs/group_trainings", recursive=True, allow_not_found=True)
    )
    return [file.path for file in infos if file.base_name == "checkpoint.pt"]


def trains(node: Server) -> bool:
    """True if one of the node's workers runs a group training."""
    workers = psutil.Process(node.process.pid).children(recursive=True)
    return any(title(worker).startswith(("ray::all in one", "ray::group: ")) for worker in workers)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[RayCluster]:
    """Head without work."""
    cluster = RayCluster(tmp_path_factory.mktemp("cluster"), num_cpus=0, dashboard=True)  # for Ray Train
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(head) -> Iterator[RayCluster]:
    """That head, without the nodes of other tests."""
    yield head
    for node in head.nodes:
        node.kill()


def on(cluster: RayCluster, *options: str) -> tuple[str, ...]:
    return ("--cluster.address", cluster.gcs, "--cluster.gpus_per_worker", "0.5", *options, *FEW_TASKS)


def test_machines_differ_in_clock_locale_and_hash_seed_and_one_is_lost(undisturbed, cluster, new_storage, tmp_path):
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 3 * 24 * 3600\n"
    )
    nodes = [
        cluster.add_node(1, 1, {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONPATH": str(ahead)}),
        cluster.add_node(1, 1, {"TZ": "America/Lima", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"}),
    ]
    finished = lost(nodes[1], Job(new_storage, *on(cluster)), lambda: checkpoints(new_storage, "group_trainings"))
    assert finished.status == 0, finished.output
    assert same(new_storage, undisturbed) and every_step_once(new_storage)


def test_a_shared_training_goes_on_with_fewer_workers(undisturbed, cluster, new_storage):
    nodes = [cluster.add_node(1, 0), cluster.add_node(1, 0)]
    options = ("--cluster.workers_per_training", "2", "--cluster.min_workers_per_training", "1", *FEW_TASKS)
    job = Job(new_storage, "--cluster.address", cluster.gcs, *options, prefix=("jobs/train_global_prompt.py",))
    finished = lost(nodes[0], job, lambda: checkpoints(new_storage, "global_prompt"))
    assert finished.status == 0, finished.output
    losses = [
        pq.read_table(next(folder.glob("global_prompt/[!.]*/history.parquet")))["loss"].to_numpy()
        for folder in (new_storage, undisturbed)
    ]
    assert len(losses[0]) == len(losses[1]) and abs(losses[0] - losses[1]).max() < 1e-3  # another order of sums


def test_the_head_is_lost_and_started_again(undisturbed, cluster, new_storage):
    node = cluster.add_node(2, 1)
    finished = lost(cluster.head, Job(new_storage, *on(cluster)), lambda: group_checkpoints(new_storage))
    assert finished.status != 0
    node.kill()
    cluster.start_head(num_cpus=0)
    cluster.add_node(2, 1)
    finished = run(new_storage, *on(cluster))
    assert finished.status == 0, finished.output
    assert finished.output.count("cached (computed in") == 5
    assert same(new_storage, undisturbed) and every_step_once(new_storage)


def test_machines_that_share_nothing_but_a_bucket_and_one_is_lost(undisturbed, tmp_path):
    """The second node sees an empty disk where the driver and the first have their copies."""
    server, cache = S3Server(tmp_path, *free_ports(1, start=9300)), tmp_path / "cache"
    cluster = RayCluster(tmp_path, num_cpus=0)
    try:
        cache.mkdir()
        cluster.add_node(1, 1)
        lost = cluster.add_node(1, 1, prefix=in_a_mount_namespace(cache))
        path, options = server.uri.split("?")
        storage = f"{path}/runs?{options}"
        job = Job(tmp_path / "unused", *on(cluster, "--storage", storage, "--cache", str(cache)))
        try:
            job.wait_until(lambda: checkpoints_in(server.uri) and trains(lost))
            lost.kill()
        finally:
            finished = job.finish()
        assert finished.status == 0, finished.output
        assert "report: s3://bucket/runs/runs/demo-" in finished.output
        (copies,) = cache.iterdir()
        assert same(copies, undisturbed)
    finally:
        cluster.stop()
        server.kill()
