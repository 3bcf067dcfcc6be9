#!/usr/bin/env python
"""CPU and wall seconds that a user waits: for a job's first line, its first training step, a rerun, a prediction.

    python benchmarks/waiting.py                    the demo, in a temporary storage
    python benchmarks/waiting.py --repeats 5        of all but the demo itself

CPU seconds are those of the job with all processes that it starts, such as Ray's workers. Medians count. The second
table has the CPU seconds that importing each library takes, of which most of the first one consists. Needs Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
import torch
from common import REPOSITORY, job_environment, table, write_results

PR_SET_CHILD_SUBREAPER = 36  # prctl: processes whose parent has ended become children of this one
JOBS = {
    "`--help`": ["jobs/full_pipeline.py", "--help"],
    "misspelled option": ["jobs/full_pipeline.py", "--training.epoch", "3"],
    "invalid value": ["jobs/full_pipeline.py", "--training.epochs", "x"],
    "no such config file": ["jobs/full_pipeline.py", "--config", "absent.yaml"],
    "no such data": ["jobs/full_pipeline.py", "--data.root", "/absent"],
    "no such weights": ["jobs/full_pipeline.py", "--clip.pretrained", "/absent.pt"],
}
IMPORTS = ("torch", "ray", "open_clip", "mlflow", "matplotlib.figure", "pandas", "scipy.optimize")
Seconds = tuple[float, float]
"""CPU and wall."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of all but the demo itself")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    meter = CpuMeter()
    rows: dict[str, Seconds] = {}

    def measure(name: str, run: Callable[[], Seconds], repeats: int = arguments.repeats) -> None:
        cpu, wall = (median(column) for column in zip(*(run() for _ in range(repeats))))
        rows[name] = cpu, wall
        print(f"{name}: {cpu:.2f} CPU s, {wall:.2f} s", file=sys.stderr, flush=True)

    for name, command in JOBS.items():
        measure(name, lambda command=command: job_seconds(meter, command))
    measure("first line of a run", lambda: seconds_until(meter, lambda job, _: job.stdout.readline()))
    measure("first training step of a new run", lambda: seconds_until(meter, first_step))
    with tempfile.TemporaryDirectory() as folder:
        storage = ["--storage", folder]
        measure("`make demo`", lambda: job_seconds(meter, ["jobs/full_pipeline.py", *storage]), 1)
        measure("the same command again", lambda: job_seconds(meter, ["jobs/full_pipeline.py", *storage]))
        (run,) = (Path(folder) / "runs").iterdir()
        image = next(run.parent.parent.glob("datasets/digits/blur_left/**/*.png"))
        predict = ["jobs/predict.py", str(run), str(image), "--task", "blur_left"]
        measure("`predict`, one image", lambda: job_seconds(meter, predict))
        solve = ["jobs/solve_grouping.py", *storage, "--grouping.objective", "mean"]
        measure("`solve-grouping`, new objective", lambda: job_seconds(meter, solve), 1)

    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}, medians of {arguments.repeats}\n")
    print(table(["", "CPU s", "wall s"], [[name, f"{cpu:.2f}", f"{wall:.2f}"] for name, (cpu, wall) in rows.items()]))
    imports = {name: import_seconds(name, arguments.repeats) for name in IMPORTS}
    print()
    print(table(["import of", "CPU s"], [[f"`{name}`", f"{seconds:.2f}"] for name, seconds in imports.items()]))
    seconds = {name.replace("`", ""): {"cpu": cpu, "wall": wall} for name, (cpu, wall) in rows.items()}
    write_results("waiting", torch.device("cpu"), {"seconds": seconds, "imports": imports, **vars(arguments)})


def job_seconds(meter: CpuMeter, command: list[str]) -> Seconds:
    """Return the seconds until a job ends; SystemExit if it fails other than by refusing the command line."""
    cpu, start = meter.seconds(), time.perf_counter()
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=job_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wall = time.perf_counter() - start
    if finished.returncode not in (0, 2):
        sys.exit(finished.stdout.decode())
    return meter.seconds() - cpu, wall


def seconds_until(meter: CpuMeter, has_begun: Callable[[subprocess.Popen[bytes], Path], object]) -> Seconds:
    """Return the seconds until a new run of the demo has begun; it is then ended."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, start = meter.seconds(), time.perf_counter()
        job = subprocess.Popen(
            [sys.executable, "jobs/full_pipeline.py", "--storage", folder],
            cwd=REPOSITORY,
            env=job_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        has_begun(job, Path(folder))
        wall = time.perf_counter() - start
        job.terminate()
        job.communicate()
        return meter.seconds() - cpu, wall


def first_step(job: subprocess.Popen[bytes], storage: Path) -> None:
    """Wait until a loss of a training step is in the run's journal."""
    while not any(b"train_loss" in journal.read_bytes() for journal in storage.glob("runs/*/tracking-*/journal.jsonl")):
        if job.poll() is not None:
            sys.exit(job.communicate()[0].decode())
        time.sleep(0.05)


class CpuMeter(threading.Thread):
    """Adds up the CPU seconds of all processes below this one: of those that nobody waits for, such as Ray's workers,
    as last seen, a tenth of a second before their end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seconds: dict[tuple[int, float], float] = {}
        self.start()

    def run(self) -> None:
        while True:
            self._sample()
            time.sleep(0.1)

    def _sample(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system

    def seconds(self) -> float:
        """Wait until all processes have ended, and return their CPU seconds so far."""
        with suppress(ChildProcessError):
            while True:
                os.wait()
        waited = os.times()
        return max(sum(self._seconds.values()), waited.children_user + waited.children_system)


def import_seconds(module: str, repeats: int) -> float:
    code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
    if module == "open_clip":  # beyond PyTorch, which it imports, and as the pipeline imports it
        code = (
            "import time, torch; from pipeline.clip.files.source import import_open_clip; start = time.process_time(); "
            "import_open_clip(); print(time.process_time() - start)"
        )
    command = [sys.executable, "-c", code]
    return median(float(subprocess.check_output(command, env=job_environment())) for _ in range(repeats))


if __name__ == "__main__":
    main()
