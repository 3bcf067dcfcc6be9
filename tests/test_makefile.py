"""make: what it says where it cannot install, and before a long wait."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from pipelines import REPOSITORY

NO_VENV = {"ensurepip": "raise ModuleNotFoundError('No module named ensurepip')"}  # a fresh Debian or Ubuntu
OLD = {"sitecustomize": "import sys; sys.version_info = (3, 10, 2, 'final', 0)"}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (NO_VENV, "on Debian or Ubuntu, sudo apt install python3-venv"),
        (OLD, "Python 3.11 or newer is needed"),
    ],
)
def test_a_python_that_cannot_install(modules, message, tmp_path):
    for name, content in modules.items():
        (tmp_path / f"{name}.py").write_text(content)
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", f"VENV={venv}", f"{venv}/.installed"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 2 and not venv.exists()
    assert message in " ".join(finished.stderr.split()) and "Traceback" not in finished.stderr


def test_a_long_wait_is_announced(tmp_path):
    target = f"{tmp_path}/venv/.installed"
    command = ["make", f"VENV={tmp_path}/venv", "PYTHON=true", target, "--dry-run"]
    lines = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert lines.index("takes minutes") < lines.index("-m venv") < lines.index("pip install")
