"""Tests that are ended in their midst leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pipelines import PATIENCE_S, REPOSITORY

pytestmark = pytest.mark.fault_injection
ENDLESS = """
import subprocess, sys, time
from pathlib import Path

def test_endless(shared_ray):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    Path("started").write_text(str(child.pid))
    time.sleep(3600)
"""


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("sent_signal", "processes"), [(signal.SIGTERM, 0), (signal.SIGKILL, 1)], ids=["ended", "killed, xdist"]
)
def test_a_killed_pytest_leaves_no_process(tmp_path, sent_signal, processes):
    (tmp_path / "test_endless.py").write_text(ENDLESS)
    started = tmp_path / "started"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", str(processes), "test_endless.py"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}{os.pathsep}{REPOSITORY}"}
    with open(tmp_path / "log", "wb") as log:
        tests = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: started.exists() and started.read_text() or tests.poll() is not None)
        assert tests.poll() is None, Path(log.name).read_text()
        child = psutil.Process(int(started.read_text()))
        wait_until(child.children)
        time.sleep(2)  # the reaper looks every second
        family = [child, *child.children(), *psutil.Process(tests.pid).children(recursive=True)]
    finally:
        tests.send_signal(sent_signal)
        tests.wait()
    assert tests.returncode == -sent_signal  # not by a handler of Ray's, which would end a test only
    assert not psutil.wait_procs(family, timeout=PATIENCE_S)[1]
