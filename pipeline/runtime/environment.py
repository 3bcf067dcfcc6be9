"""Environment of a run: package versions, machine, git commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress

import torch

PACKAGES = ("torch", "ray", "mlflow", "open_clip_torch", "transformers", "numpy", "pyarrow")
GIT_COMMIT = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]


def run_environment() -> dict[str, str]:
    """Return name → value of what is known about the environment."""
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "gpus": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
    }
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            environment[package] = importlib.metadata.version(package)
    with suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(GIT_COMMIT, text=True, stderr=subprocess.DEVNULL, timeout=10)
        environment["git_commit"] = output.strip()
    return environment
