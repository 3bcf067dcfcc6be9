"""Runs job scripts, as users do in processes of their own or in this one, and compares what they leave."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from mlflow import MlflowClient

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCHS, GLOBAL_PROMPT_EPOCHS = 6, 4
QUICK = (
    *("--training.epochs", str(EPOCHS), "--global_prompt.epochs", str(GLOBAL_PROMPT_EPOCHS)),
    *("--training.batch_size", "8", "--training.checkpoint_every", "1"),
)
"""An epoch has five steps."""
LONG_EPOCHS = 8
NUM_CLASSES = 5
FEW_TASKS = (
    *(*QUICK, "--data.tasks", "[blur_left, blur_right, ink_left]", "--training.epochs", str(LONG_EPOCHS)),
    *("--data.class_names", str(REPOSITORY / "tests" / "class_names.txt"), "--training.batch_size", "4"),
    *("--grouping.num_groups", "2"),
)
"""Two groups, half of the classes and of a batch, so as many steps, and trainings long enough to be hit: for runs that
are broken, and the undisturbed one."""
PATIENCE_S = 900
"""No test waits longer for a job; ten times what one takes on two quiet cores."""


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


@dataclass
class Finished:
    status: int
    output: str


def prepare(storage: Path, digits: Path) -> Path:
    """Make a storage with a copy of the demo's images and an MLflow database without runs."""
    from pipeline.runtime.tracking.database import prepare_database, sqlite_uri

    shutil.copytree(digits, storage / "datasets" / "digits")
    prepare_database(sqlite_uri(storage / "mlflow.db"))
    return storage


class Job:
    """A job script in its own process group; `stop` leaves nothing of it behind."""

    def __init__(
        self,
        storage: Path,
        *arguments: str,
        prefix: tuple[str, ...] = ("jobs/full_pipeline.py",),
        env=None,
        logs: Path | None = None,
        storage_option: bool = True,
        cwd: Path = REPOSITORY,
    ):
        """`logs`: folder of the output, if not beside the storage; `storage_option`: whether the script takes it."""
        self.output = (logs or storage.parent) / f"{storage.name}-{time.monotonic_ns()}.log"
        with open(self.output, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *prefix, *(["--storage", str(storage)] if storage_option else []), *arguments],
                cwd=cwd,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Tests that run in the background of a shell would hand on that interrupts are ignored.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
            )

    def wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE_S, pause: float = 0.05) -> None:
        """Raises AssertionError with the job's output if the job ends or the time passes first."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.output.read_text()
            time.sleep(pause)

    def workers(self, label: str) -> list[psutil.Process]:
        """Ray worker processes that are now running the work `label`."""
        return [process for process in self._family() if title(process).startswith(f"ray::{label}")]

    def finish(self, timeout: float = PATIENCE_S) -> Finished:
        """Waits for the end, and until every process that the job started is gone."""
        family = self._family()
        try:
            status = self.process.wait(timeout)
        finally:
            family += self.stop()
        assert not psutil.wait_procs(family, timeout=60)[1], "the job left processes behind"
        return Finished(status, self.output.read_text())

    def stop(self) -> list[psutil.Process]:
        family = self._family()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for process in psutil.wait_procs(family, timeout=60)[1]:
            process.kill()
        return family

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def run(storage: Path, *arguments: str, **options) -> Finished:
    """jobs/full_pipeline.py, or the script of `prefix`, in a process of its own."""
    return Job(storage, *arguments, **options).finish()


def ensure_ray() -> None:
    """Starts the Ray of this test process; use the fixtures `shared_ray` and `run_job`, after which it ends."""
    import ray

    from pipeline.runtime.cluster import local_ray_options, start_local_ray
    from pipeline.runtime.ray_start import temporary_folder

    if not ray.is_initialized():  # with a dashboard, which Ray Train and Ray Tune ask about placement groups
        on_termination = signal.getsignal(signal.SIGTERM)
        options = local_ray_options(dashboard=True, num_cpus=2)
        # Else Ray ends a worker that is idle for a second wherever there are more than CPUs, counting actors, and the
        # next work waits for another one to import PyTorch.
        # By Ray's niceness of 15 they would wait for all other tests' processes, and the tests that use Ray end last.
        options["_system_config"] = {"num_workers_soft_limit": 4, "worker_niceness": 0}
        start_local_ray(temporary_folder()[0], options, print)
        signal.signal(signal.SIGTERM, on_termination)  # Ray's own would end one test, and pytest go on to the next


def run_in_process(job: str, *arguments: object) -> Finished:
    """jobs/<job>.py in this process; use the fixture `run_job`."""
    from jobs.__main__ import run_script

    ensure_ray()
    output, script = io.StringIO(), str(REPOSITORY / "jobs" / f"{job}.py")
    command_line, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            run_script(job)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = command_line
    return Finished(status, output.getvalue())


def the_run(storage: Path) -> Path:
    """The only run folder in a storage."""
    (folder,) = (storage / "runs").iterdir()
    return folder


def summary(storage: Path) -> dict:
    return json.loads((the_run(storage) / "report" / "summary.json").read_text())


def numbers(storage: Path) -> dict[str, object]:
    """All that must be the same in two runs of one config: file → bytes, whatever the artifacts' keys."""
    files: dict[str, object] = {"methods": summary(storage)["methods"], "groups": summary(storage)["groups"]}
    (splits,) = (storage / "splits").glob("[!.]*")
    for file in sorted(splits.rglob("*.parquet")) + [splits / "splits.json"]:
        files[str(file.relative_to(splits))] = file.read_bytes()
    for stage in ("global_prompt", "single_tasks", "grouping", "image_features", "group_trainings"):
        for folder in (storage / stage).glob("[!.]*"):
            inputs = json.loads((folder / "artifact.json").read_text())["inputs"]
            name = " ".join(str(inputs.get(part, "")) for part in ("method", "group", "task", "split", "prompts_of"))
            for file in sorted(folder.glob("*")):
                if file.suffix in (".parquet", ".safetensors") or file.name == "grouping.json":
                    assert f"{stage} {name} {file.name}" not in files
                    files[f"{stage} {name} {file.name}"] = file.read_bytes()
    for file in (the_run(storage) / "adapters").iterdir():
        files[file.name] = file.read_bytes()
    return files


def every_step_once(storage: Path, uri: str | None = None) -> bool:
    """Check that the last pipeline's MLflow runs hold each step's loss once, in both training stages."""
    from pipeline.config import load_yaml, parse_config

    client = MlflowClient(uri or f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("mmap-clip")
    config = parse_config(load_yaml(the_run(storage) / "config.yaml"))
    num_classes = NUM_CLASSES if config.data.class_names else 10
    num_steps = math.ceil(num_classes * config.data.shots / config.training.batch_size)  # of an epoch
    for name, epochs in (("all in one", config.training.epochs), ("global_prompt", config.global_prompt.epochs)):
        run, *_ = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")
        losses = client.get_metric_history(run.info.run_id, "train_loss/blur_right")
        if sorted(loss.step for loss in losses) != list(range(1, num_steps * epochs + 1)):
            return False
    return True
