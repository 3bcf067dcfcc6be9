"""Many small trainings on a cluster whose workers are killed at random: all finish, and nothing piles up."""

from __future__ import annotations

import random
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
from pipelines import Job, title
from servers import RayCluster

pytestmark = [pytest.mark.fault_injection, pytest.mark.timeout(1500)]
TASKS = ("blur_left", "blur_right", "ink_left", "thick_left")
SEEDS = range(1, 4)
TRAININGS = len(SEEDS) * (2 ** len(TASKS) - 1)
OPTIONS = (
    *("--data.tasks", f"[{', '.join(TASKS)}]", "--training.epochs", "1", "--global_prompt.epochs", "1"),
    *("--data.shots", "2", "--training.batch_size", "8", "--cluster.max_retries", "10"),
)
STUDY = ("jobs/grouping_study.py",)


@dataclass(eq=False)  # a thread is known by itself
class Killer(Thread):
    """Kills a worker in the midst of its work for every few artifacts that are made, and looks at what the long-lived
    processes hold."""

    job: Job
    cluster: RayCluster
    storage: Path
    interval: int = 2
    killed: int = 0
    samples: list[dict[str, tuple[float, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.done, self._random = Event(), random.Random(1)

    def run(self) -> None:
        while not self.done.wait(0.3):
            if len(list(self.storage.glob("*/[!.]*/artifact.json"))) < self.interval * (self.killed + 1):
                continue
            workers = [
                process
                for node in self.cluster.nodes
                for process in psutil.Process(node.process.pid).children(recursive=True)
                if title(process).startswith(("ray::group", "ray::each", "ray::losses", "ray::write", "ray::global"))
            ]
            if workers:
                self.samples.append(self._held())  # before the kill, after which Ray is starting another worker
                with suppress(psutil.NoSuchProcess):
                    self._random.choice(workers).kill()
                    self.killed += 1

    def _held(self) -> dict[str, tuple[float, int]]:
        """Memory in MiB and open files of the driver and of Ray's servers; of all nodes together, since workers, and
        what a node holds open for each, come and go on either."""
        roots = {
            "driver": [self.job.process.pid],
            "head": [self.cluster.head.process.pid],
            "nodes": [node.process.pid for node in self.cluster.nodes],
        }
        usage = {}
        for name, pids in roots.items():
            try:
                processes = [psutil.Process(pid) for pid in pids]
                family = [*processes, *(child for root in processes for child in root.children(recursive=True))]
                family = [process for process in family if stays(process)]
                memory = sum(process.memory_info().rss for process in family) / 2**20
                usage[name] = (round(memory), sum(process.num_fds() for process in family))
            except psutil.Error:  # one of them has just ended
                continue
        return usage


@pytest.fixture
def few_digits(digits, tmp_path) -> Path:
    """Two training and four test images of each class, so that trainings are begun and ended, and little else."""
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    for split, number in (("train", 2), ("test", 4)):
        for folder in root.glob(f"*/{split}/*"):
            for file in sorted(folder.iterdir())[number:]:
                file.unlink()
    return root


def test_soak(run_job, few_digits, tmp_path, capsys):
    options = ("--config", "configs/demo.yaml", "--data.root", str(few_digits), *OPTIONS)
    cluster = RayCluster(tmp_path, num_cpus=0)
    try:
        for _ in range(2):
            cluster.add_node(1)
        storage, began = tmp_path / "storage", time.monotonic()
        seeds = ("--seeds", *map(str, SEEDS))
        job = Job(storage, "--cluster.address", cluster.gcs, *options, *seeds, prefix=STUDY)
        killer = Killer(job, cluster, storage)
        killer.start()
        try:
            finished = job.finish()
        finally:
            killer.done.set()
            killer.join()
        seconds = time.monotonic() - began
        assert finished.status == 0, finished.output
    finally:
        cluster.stop()
    results = list(storage.glob("group_trainings/[!.]*/result.json"))
    assert len(results) == TRAININGS
    assert not list(storage.glob("*/.staging-*"))

    lines = [f"{TRAININGS} trainings in {seconds:.0f} s, {killer.killed} workers killed"]
    early, late = least(killer.samples, 0.25, 0.5), least(killer.samples, 0.75, 1)
    for name in sorted(early.keys() & late.keys()):
        (memory, files), (later_memory, later_files) = early[name], late[name]
        lines.append(f"{name}: {memory} to {later_memory} MiB, {files} to {later_files} open files")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert killer.killed >= 20
    for name in early.keys() & late.keys():
        (memory, files), (later_memory, later_files) = early[name], late[name]
        assert later_memory < memory + 45 and later_files < files + 22, lines

    quiet = tmp_path / "quiet"
    assert run_job("grouping_study", "--storage", quiet, *options, "--seeds", "1").status == 0
    for folder in quiet.glob("group_trainings/[!.]*"):
        for name in ("adapter.safetensors", "predictions.parquet", "history.parquet"):
            assert (folder / name).read_bytes() == same_training(storage, folder, name).read_bytes()


def stays(process: psutil.Process) -> bool:
    """Workers come and go, of which a new one is not yet named; Ray's log monitor keeps the logs of workers open, also
    of dead ones, up to 200 files."""
    programs = (Path(word).name for word in process.cmdline())
    return not title(process).startswith("ray::") and not {"default_worker.py", "log_monitor.py"} & set(programs)


def least(samples: list[dict[str, tuple[float, int]]], start: float, end: float) -> dict[str, tuple[float, int]]:
    """Return the minima over a part of the samples: what piles up stays, whereas a worker that is alive, and a program
    that is just starting another one, hold more for a moment."""
    values_by_name: dict[str, list[tuple[float, int]]] = {}
    for sample in samples[int(len(samples) * start) : int(len(samples) * end)]:
        for name, usage in sample.items():
            values_by_name.setdefault(name, []).append(usage)
    return {name: tuple(map(min, zip(*usage))) for name, usage in values_by_name.items()}


def same_training(storage: Path, reference: Path, name: str) -> Path:
    """File of the same training in another storage, by its key."""
    return storage / "group_trainings" / reference.name / name
