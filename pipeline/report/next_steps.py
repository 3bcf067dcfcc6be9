"""Next steps after a run: shell commands to paste, and addresses to open."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MLFLOW_PORT = 5000


def program(name: str, module: str) -> list[str]:
    """Return the words that call a console script of this Python environment: its name where the shell finds it, else
    its path, or its module if it is not installed."""
    script = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(script):
        return [name]
    if not script.exists():
        return [sys.executable, "-m", module]
    relative = os.path.relpath(script)
    return [str(script) if relative.startswith("..") else relative]


def job_command(job: str, *arguments: str) -> str:
    return shlex.join([*program("mmap-clip", "jobs"), job, *arguments])


class NextStep(NamedTuple):
    """Step that a user may take: a shell command to run, an address to open, or first one and then the other."""

    purpose: str
    command: str
    url: str = ""


def comparison_step(tracking_uri: str, table_path: str) -> NextStep:
    """Return how to open MLflow's table of all methods, of this path: at its server, or at one that is started for a
    database."""
    if tracking_uri.startswith(("http://", "https://")):
        return NextStep("Compare methods and runs in MLflow", "", tracking_uri.rstrip("/") + table_path)
    command = [*program("mlflow", "mlflow"), "ui", "--backend-store-uri", tracking_uri, "--port", str(MLFLOW_PORT)]
    url = f"http://127.0.0.1:{MLFLOW_PORT}{table_path}"
    return NextStep("Compare methods and runs: start MLflow, then open its table", shlex.join(command), url)


def next_steps(
    run: str,
    name: str,
    task: str,
    images: Sequence[str],
    tracking_uri: str,
    table_path: str | None,
    takes_tasks: bool = True,
) -> list[NextStep]:
    """Return what to do with a run.

    Args:
        run: URI of the run directory.
        name: name of the data set.
        images: paths of some images of the task.
        table_path: path of MLflow's table of all methods; None if it is unknown, as the server was not reached.
        takes_tasks: whether tasks can be added to the run.
    """
    model = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80] or "model"
    steps = [
        NextStep("Classify images", job_command("predict", run, *images, "--task", task)),
        NextStep("Answer over HTTP", job_command("serve", "--models", f"{model}={run}")),
    ]
    if takes_tasks:
        command = job_command("add-task", "--run", run, "--task", "NEW_TASK", "--data.root", "FOLDER")
        steps.append(NextStep("Add a task", command))
    return [*steps, *([comparison_step(tracking_uri, table_path)] if table_path else [])]


def format_next_steps(steps: Sequence[NextStep]) -> str:
    """Return the steps as lines for the terminal."""
    lines = []
    for step in steps:
        lines += [f"# {step.purpose}", *(part for part in (step.command, step.url) if part)]
    return "\n".join(lines)
