"""Machines that are lost and differ: afterwards the pipeline has the numbers of a quiet run."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from breaking import checkpoints, group_checkpoints, lost, same, suspended, without_trainings_of_groups
from pipelines import FEW_TASKS, Job, every_step_once, run, summary, title
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


@pytest.fixture
def unlike(tmp_path) -> tuple[dict[str, str], dict[str, str]]:
    """Environments of two machines: other time zones, locales, hash seeds, and clocks three days apart."""
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 3 * 24 * 3600\n"
    )
    return (
        {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONPATH": str(ahead)},
        {"TZ": "America/Lima", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"},
    )


def test_shared_trainings_go_on_with_fewer_workers(undisturbed, cluster, tmp_path):
    """Data parallel by Ray Train, first with a worker that is lost: the numbers of one worker, up to the rounding of
    another order of sums."""
    storage = without_trainings_of_groups(undisturbed, tmp_path / "storage")
    nodes = [cluster.add_node(1, 0), cluster.add_node(1, 0)]
    options = ("--cluster.workers_per_training", "2", "--cluster.min_workers_per_training", "1", *FEW_TASKS)
    job = Job(storage, "--cluster.address", cluster.gcs, *options, "--grouping.num_groups", "1")
    try:
        job.wait_until(lambda: checkpoints(storage, "global_prompt"))
        nodes[0].kill()
        job.wait_until(lambda: list(storage.glob("global_prompt/[!.]*")))
        with suspended(job):
            cluster.add_node(1, 0)  # two again
    finally:
        finished = job.finish()
    assert finished.status == 0, finished.output
    assert every_step_once(storage)
    losses = [
        pq.read_table(next(folder.glob("global_prompt/[!.]*/history.parquet")))["loss"].to_numpy()
        for folder in (storage, undisturbed)
    ]
    assert len(losses[0]) == len(losses[1]) and abs(losses[0] - losses[1]).max() < 1e-3
    for method in ("zero_shot", "all_in_one"):
        single, shared = (summary(folder)["methods"][method]["accuracy"] for folder in (undisturbed, storage))
        assert shared == pytest.approx(single, abs=0.01), method  # of 180 images, one may be on the fence


def test_the_head_is_lost_and_started_again(undisturbed, cluster, new_storage, unlike):
    node = cluster.add_node(2, 1, unlike[0])
    finished = lost(cluster.head, Job(new_storage, *on(cluster)), lambda: group_checkpoints(new_storage))
    assert finished.status != 0
    node.kill()
    cluster.start_head(num_cpus=0)
    cluster.add_node(2, 1, unlike[1])
    finished = run(new_storage, *on(cluster))
    assert finished.status == 0, finished.output
    assert finished.output.count("cached (computed in") == 5
    assert same(new_storage, undisturbed) and every_step_once(new_storage)


def test_unlike_machines_that_share_nothing_but_a_bucket_and_one_is_lost(undisturbed, tmp_path, unlike):
    """The second node sees an empty disk where the driver and the first have their copies."""
    server, cache = S3Server(tmp_path, *free_ports(1, start=9300)), tmp_path / "cache"
    cluster = RayCluster(tmp_path, num_cpus=0)
    try:
        cache.mkdir()
        cluster.add_node(1, 1, unlike[0])
        lost = cluster.add_node(1, 1, unlike[1], in_a_mount_namespace(cache))
        path, options = server.uri.split("?")
        storage, uri = f"{path}/runs?{options}", f"sqlite:///{tmp_path}/mlflow.db"
        places = ("--storage", storage, "--cache", str(cache), "--tracking.uri", uri)
        job = Job(tmp_path / "unused", *on(cluster, *places))
        try:
            job.wait_until(lambda: checkpoints_in(server.uri) and trains(lost))
            lost.kill()
        finally:
            finished = job.finish()
        assert finished.status == 0, finished.output
        assert "report: s3://bucket/runs/runs/demo-" in finished.output
        (copies,) = cache.iterdir()
        assert same(copies, undisturbed) and every_step_once(copies, uri)
    finally:
        cluster.stop()
        server.kill()
