"""Environment of a run: package versions, machine, git commit."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch

from pipeline.cpus import usable_cpus

PACKAGES = ("torch", "ray", "mlflow", "open_clip_torch", "transformers", "torchjd", "numpy", "pyarrow")
GIT_COMMIT = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]

_python_call: ContextVar[str | None] = ContextVar("python_call", default=None)


@contextmanager
def called_from_python(call: str) -> Iterator[None]:
    """Let the runs of the block record a call, `pipeline.fit(...)`, instead of this process's command line."""
    token = _python_call.set(call)
    try:
        yield
    finally:
        _python_call.reset(token)


def run_command() -> str:
    """Return the shell command, or the call from Python, that makes this run."""
    if call := _python_call.get():
        return call
    script, *arguments = sys.argv
    return shlex.join([*(["python", script] if script.endswith(".py") else script.split()), *arguments])


def source_name() -> str:
    """Return the script, or the function called from Python, for MLflow's column "Source"."""
    return (_python_call.get() or sys.argv[0]).partition("(")[0]


def run_environment() -> dict[str, str]:
    """Return name → value of what is known about the environment."""
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(usable_cpus()[0]),
        "gpus": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
    }
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            environment[package] = importlib.metadata.version(package)
    with suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(GIT_COMMIT, text=True, stderr=subprocess.DEVNULL, timeout=10)
        environment["git_commit"] = output.strip()
    return environment
