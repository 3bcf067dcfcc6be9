"""What a result depends on beside the config: versions, machine, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress

import torch

PACKAGES = ("torch", "ray", "mlflow", "open_clip_torch", "numpy", "pyarrow")
GIT_COMMIT = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]


def run_environment() -> dict[str, str]:
    """Name → value, of what can be found out."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "gpus": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
    }
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(GIT_COMMIT, text=True, stderr=subprocess.DEVNULL, timeout=10)
        found["git_commit"] = output.strip()
    return found
