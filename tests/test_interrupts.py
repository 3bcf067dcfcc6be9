"""Signals: one line on stderr and the right status at any moment, and where the same command resumes."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray
from breaking import checkpoints
from mlflow import MlflowClient
from pipelines import QUICK, REPOSITORY, Finished, Job
from rich.console import Console

import jobs.__main__
from pipeline import interrupts
from pipeline.command_line import report_user_errors
from pipeline.config import Config
from pipeline.interrupts import Interrupted
from pipeline.runtime.cluster import WorkerResources, _signals_end_the_start
from pipeline.runtime.progress import ProgressDisplay, Report
from pipeline.runtime.stage import Stage
from pipeline.workflows import many_runs

STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def handlers():
    """Install the handlers of a job during a test, and pytest's afterwards."""
    previous = {number: signal.getsignal(number) for number in STATUSES}
    for number in STATUSES:
        signal.signal(number, signal.SIG_DFL)  # the tests may run in the background, where interrupts are ignored
    interrupts._State.received_at = -1e9
    interrupts.handle_signals()
    yield
    interrupts.forget_signals()
    for number, handler in previous.items():
        signal.signal(number, handler)


def line_of(capsys) -> str:
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(("number", "status"), STATUSES.items())
def test_a_signal_ends_a_job_in_one_line(number, status, capsys):
    with pytest.raises(SystemExit) as exited, report_user_errors():
        os.kill(os.getpid(), number)
    assert exited.value.code == status
    name = "" if number == signal.SIGINT else f" by {number.name}"
    assert line_of(capsys) == f"interrupted{name}: rerun the same command to resume\n"


def test_a_library_that_turns_the_interrupt_into_its_own_error(capsys):
    with pytest.raises(SystemExit) as exited, report_user_errors():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            raise ImportError("cannot import name 'x'") from None
    assert exited.value.code == 143 and line_of(capsys).startswith("interrupted by SIGTERM")


def test_the_same_signal_twice_at_once_is_one(capsys):
    """`timeout` sends a signal to the process and to its group."""
    with pytest.raises(SystemExit) as exited, report_user_errors():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert exited.value.code == 143 and line_of(capsys)


def test_an_exception_that_python_drops_is_raised_again():
    """A finalizer and a hook of os.fork drop exceptions."""

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        Finalized()
        time.sleep(60)


def test_ray_s_handlers_of_sigterm_are_not_installed():
    with _signals_end_the_start():
        ray._private.utils.set_sigterm_handler(lambda *_: sys.exit(15))
        assert interrupts._State.ends_at_once
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_ray_prints_while_it_starts_is_told_when_it_has_started(capfd):
    with _signals_end_the_start():
        os.write(2, b"a warning of its core\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a warning of its core\n"


def test_a_job_of_mmap_clip(tmp_path, monkeypatch):
    """Its script is executed by importlib, but not imported."""
    (tmp_path / "job.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)")
    monkeypatch.setattr(jobs.__main__, "__file__", str(tmp_path / "__main__.py"))
    with pytest.raises(Interrupted):
        jobs.__main__.run_script("job")


def test_other_threads_leave_the_handlers_alone():
    thread = threading.Thread(target=interrupts.handle_signals)
    thread.start()
    thread.join()  # signal.signal would have raised


def stage_at(*reports: Report) -> Stage:
    stage = Stage.__new__(Stage)
    stage.title, stage.display = "2 global prompt", ProgressDisplay(Console(file=io.StringIO()), "")
    for report in reports:
        stage.display.show(report)
    return stage


@pytest.mark.parametrize(
    ("reports", "resume_point"),
    [
        ([], "stage 2 global prompt"),
        ([Report("global prompt", 40, 100, "steps", saved=0)], "stage 2 global prompt, step 0 of 100"),
        ([Report("global prompt", 70, 100, "steps", saved=50)], "stage 2 global prompt, step 50 of 100"),
        ([Report("global prompt", 100, 100, "steps", saved=50)], "stage 2 global prompt"),  # its artifact is written
        ([Report("reading", 3, 9, "images")], "stage 2 global prompt"),
        (
            [Report(f"group: {name}", 3, 9, "steps", saved=2) for name in "abcde"],
            "stage 2 global prompt, step 2 of 9 of group: a, step 2 of 9 of group: b, step 2 of 9 of group: c and 2 "
            "more trainings",
        ),
    ],
)
def test_the_line_says_where_the_same_command_resumes(reports, resume_point):
    assert stage_at(*reports)._resume_point() == resume_point


def test_a_signal_while_a_stage_prints_its_title():
    """As in a test or a script that waits for the title to send it."""
    stage, statuses = stage_at(), []
    stage.session = SimpleNamespace(
        tracker=SimpleNamespace(start_run=lambda *_, **__: None, end_run=lambda *status: statuses.append(status))
    )
    stage.name = "global_prompt"
    stage.display._console.print = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted), stage:
        pass
    assert interrupts.resume_point() == "stage 2 global prompt" and statuses == [("global_prompt", "KILLED")]


def test_several_runs_at_once_say_how_many_are_left(monkeypatch, capsys):
    """As in a benchmark, whose runs are in threads: the signal cancels them, and each ends its MLflow run."""

    @contextmanager
    def run_session(plan, connect, console, cancelled):
        yield cancelled

    def work(plan, cancelled):
        if plan.number == 1:
            return
        if plan.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        assert cancelled.wait(60)
        raise InterruptedError

    monkeypatch.setattr(many_runs, "run_session", run_session)
    plans = [SimpleNamespace(number=number, config=Config()) for number in (1, 2, 3)]
    with pytest.raises(SystemExit) as exited, report_user_errors():
        list(many_runs.map_concurrently(plans, lambda: WorkerResources(1, 0), work))
    assert exited.value.code == 143
    assert re.search(r"SIGTERM: rerun the same command to resume at the [123] of 3 runs that have", line_of(capsys))


@pytest.mark.parametrize("saved", [0, 50])
def test_a_resumed_training_says_from_which_step(saved):
    console = Console(file=io.StringIO())
    ProgressDisplay(console, "").show(Report("global prompt", saved, 100, "steps", saved=saved, resumed=True))
    assert console.file.getvalue() == f"  global prompt: resumes at step {saved} of 100\n"


JOB = """
import os, signal, sys, time
from types import SimpleNamespace
ignored = getattr(signal, sys.argv[1]) if sys.argv[1] else None
if ignored: signal.signal(ignored, signal.SIG_IGN)
from pipeline.command_line import importing, report_user_errors
moment = sys.argv[2]
def kill(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.3)
if moment == "script": kill(signal.SIGTERM)
with report_user_errors():
    if moment == "import":
        with importing("x"):
            try: kill(signal.SIGTERM)
            except BaseException: pass  # swallowed
    if moment == "announced":
        with importing("x", SimpleNamespace(print=lambda *_, **__: kill(signal.SIGTERM))): pass
    if moment == "psutil half imported":
        sys.modules["psutil"] = SimpleNamespace()
        with importing("x"): kill(signal.SIGTERM)
    if moment.startswith("imports"):
        def find_spec(*_):
            try: kill(*[signal.SIGTERM] * (2 if "twice" in moment else 1))
            except BaseException: print("raised where Python's import lock is locked", file=sys.stderr)
        sys.meta_path.append(SimpleNamespace(find_spec=find_spec))
        try: import missing
        except ImportError: time.sleep(60)
    if moment == "ignored": kill(ignored)
    if moment == "twice":
        try: kill(signal.SIGINT)
        finally:
            time.sleep(0.3)
            kill(signal.SIGINT)
print("ended")
"""


@pytest.mark.parametrize(
    ("moment", "ignored", "status", "line"),
    [
        ("script", "", 143, "interrupted by SIGTERM: rerun the same command: nothing was started yet"),
        ("import", "", 143, "importing x ...\ninterrupted by SIGTERM: rerun the same command: nothing was started yet"),
        ("announced", "", 143, "interrupted by SIGTERM: rerun the same command: nothing was started yet"),
        (
            "psutil half imported",
            "",
            143,
            "importing x ...\ninterrupted by SIGTERM: rerun the same command: nothing was started yet",
        ),
        ("imports", "", 143, "interrupted by SIGTERM: rerun the same command to resume"),
        ("imports, twice", "", 143, "interrupted by SIGTERM: stopped at once"),
        ("twice", "", 130, "interrupted: stopped at once"),
        ("ignored", "SIGHUP", 0, ""),  # nohup
        ("ignored", "SIGINT", 0, ""),  # `command &` in a script
    ],
)
def test_a_process(moment, ignored, status, line):
    command = [sys.executable, "-c", JOB, ignored, moment]
    process = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (process.returncode, process.stderr.strip()) == (status, line)
    assert process.stdout == ("" if status else "ended\n")


PYTORCH_ON_A_SLOW_DISK = """
import sys, time
from types import SimpleNamespace
def find_spec(name, path=None, target=None):
    if name == "torch" and sys.argv[0].endswith("{program}"): time.sleep(60)
sys.meta_path.insert(0, SimpleNamespace(find_spec=find_spec))
"""
"""A busy machine may take longer to send a signal than the job to import PyTorch, or its worker to check the images."""


@pytest.mark.fault_injection
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("moment", "slow", "number", "message"),
    [
        ("importing PyTorch", "full_pipeline.py", signal.SIGINT, "nothing was started yet"),
        ("starting Ray", "none", signal.SIGTERM, "rerun the same command to resume"),
        ("0 data check", "default_worker.py", signal.SIGHUP, "to resume at stage 0 data check"),
    ],
)
def test_a_run_that_begins(moment, slow, number, message, tmp_path):
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(PYTORCH_ON_A_SLOW_DISK.replace("{program}", slow))
    job = Job(tmp_path / "storage", *QUICK, env={"PYTHONPATH": f"{ahead}{os.pathsep}{REPOSITORY}"})
    finished = interrupted(job, lambda job: moment in job.output.read_text(), number)
    assert message in finished.output.splitlines()[-1]


@pytest.mark.fault_injection
@pytest.mark.timeout(1200)
def test_a_training_resumes_at_the_step_that_the_line_names(new_storage):
    options = (*QUICK, "--data.tasks", "blur_right", "blur_left", "--global_prompt.epochs", "300")
    script = ("jobs/train_global_prompt.py",)
    job = Job(new_storage, *options, prefix=script)
    finished = interrupted(job, lambda job: checkpoints(new_storage, "global_prompt"), signal.SIGTERM)
    named = re.search(r"resume at stage 2 global prompt, step (\d+) of 1500$", finished.output.strip())
    assert named and int(named[1]) > 0, finished.output
    job = Job(new_storage, *options, prefix=script)
    finished = interrupted(job, lambda job: "resumes at step" in job.output.read_text(), signal.SIGINT)
    resumed = re.search(r"global prompt: resumes at step (\d+) of 1500", finished.output)
    assert 0 <= int(resumed[1]) - int(named[1]) <= 5 * EPOCHS_IN_BETWEEN, finished.output


EPOCHS_IN_BETWEEN = 20
"""A worker may write checkpoints between its last report and its end."""


def interrupted(job: Job, condition, number: signal.Signals) -> Finished:
    try:
        job.wait_until(lambda: condition(job))
        job.process.send_signal(number)
    finally:
        finished = job.finish()
    assert finished.status == STATUSES[number], finished.output
    assert not any(word in finished.output for word in ("Traceback", "Exception ignored", "***")), finished.output
    database = job.output.parent / "storage" / "mlflow.db"
    if database.exists():
        client = MlflowClient(f"sqlite:///{database}")
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        assert {run.info.status for run in runs} <= {"KILLED", "FINISHED"}
        (parent,) = [run for run in runs if run.data.tags.get("level") == "pipeline"]
        assert parent.info.status == "KILLED" and parent.info.run_name != "pipeline" and parent.data.params
    return finished
