"""What is imported when: a command line is answered, and a worker trains, without the libraries that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pipelines import REPOSITORY

from jobs.__main__ import job_names

HEAVY = {"torch", "ray", "mlflow", "pandas", "scipy", "matplotlib", "sklearn", "open_clip", "pyarrow"}
REQUIRED = {
    "add_task": ["--run", "a_run", "--task", "a_task"],
    "predict": ["--prompts", "a_run", "an_image"],
    "register_model": ["--run", "a_run", "--name", "a_name"],
    "serve": ["--model", "a_name=a_run"],
    "tune": ["--search", "a_search.yaml"],
}
WITHOUT_CONFIG_FIELDS = ("predict", "register_model", "serve")
TRAINING_MODULES = [
    "pipeline.methods.registry",
    "pipeline.stages.global_prompt",
    "pipeline.stages.group_trainings",
    "pipeline.stages.image_features",
    "pipeline.runtime.stage",
    "pipeline.stages.training_work",
    "pipeline.training.loop",
]
OTHER_WORKER_MODULES = [
    "pipeline.prediction.batch",
    "pipeline.serving.replica",
    "pipeline.workflows.added_task",
    "pipeline.stages.data_check",
    "pipeline.workflows.held_out",
    "pipeline.stages.splits",
    "pipeline.workflows.tuning_trial",
]


def output_of(code: str, *arguments: object) -> list[str]:
    """The lines that a new process prints; `arguments` are in sys.argv[1] as JSON."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def modules_after_importing(*modules: str) -> set[str]:
    code = "import importlib, json, sys; [*map(importlib.import_module, json.loads(sys.argv[1]))]; print(*sys.modules)"
    return set(output_of(code, *modules)[-1].split())


ANSWER_COMMAND_LINES = """
import json, runpy, sys
script, *command_lines = json.loads(sys.argv[1])
for arguments in command_lines:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("exit status:", end.code)
print(*sys.modules)
"""


@pytest.mark.parametrize("job", ["__main__", *job_names()])
def test_help_and_wrong_options_of_a_job_import_nothing_heavy(job):
    required = REQUIRED.get(job, [])
    wrong = [] if job == "__main__" else [[*required, "--no_such_option", "1"]]
    # add_task reads the finished run, whose config it takes, before its values are checked.
    if job not in ("__main__", "add_task", *WITHOUT_CONFIG_FIELDS):
        wrong.append([*required, "--training.epochs", "-1"])
    if job == "full_pipeline":
        wrong.append(["--until", "no_stage"])
    *answers, modules = output_of(ANSWER_COMMAND_LINES, f"jobs/{job}.py", ["--help"], *wrong)
    assert any(line.startswith("usage: ") for line in answers)
    statuses = [line.removeprefix("exit status: ") for line in answers if line.startswith("exit status: ")]
    assert statuses == ([] if job == "__main__" else ["0"]) + ["2"] * len(wrong)
    assert not HEAVY & set(modules.split())


def test_a_training_worker_imports_only_what_it_trains_with():
    modules = modules_after_importing(*TRAINING_MODULES)
    assert "torch" in modules
    unused = {"mlflow", "matplotlib", "pandas", "scipy", "sklearn", "networkx", "optuna", "rich", "ray.train"}
    assert not unused & modules


def test_no_worker_imports_what_the_driver_tracks_and_draws_with():
    assert not {"mlflow", "matplotlib", "sklearn", "optuna"} & modules_after_importing(*OTHER_WORKER_MODULES)


def test_the_tracker_imports_mlflow_only_when_it_delivers():
    assert not {"mlflow", "torch", "ray"} & modules_after_importing("pipeline.runtime.tracking")
