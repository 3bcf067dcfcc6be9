"""What is imported when: a command line is answered, and a worker trains, without the libraries that take seconds; and
which room imports which."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict

import networkx
import pytest
from pipelines import REPOSITORY

from jobs.__main__ import job_names

HEAVY = {"torch", "ray", "mlflow", "pandas", "scipy", "matplotlib", "sklearn", "open_clip", "pyarrow"}
REQUIRED = {
    "add_task": ["--run", "a_run", "--task", "a_task"],
    "predict": ["--adapter", "a_run", "an_image"],
    "register_model": ["--run", "a_run"],
    "serve": ["--models", "a_name=a_run"],
    "tune": ["--search", "a_search.yaml"],
}
WITHOUT_CONFIG_FIELDS = ("predict", "register_model", "serve")
JOBS = ["__main__", *job_names()]
TRACKER = "pipeline.runtime.tracking.tracker"
DECODING = "pipeline.prediction.decoding"
TRAINING_MODULES = [
    "pipeline.methods.registry",
    "pipeline.stages.global_prompt",
    "pipeline.stages.group_trainings",
    "pipeline.stages.image_features",
    "pipeline.runtime.stage",
    "pipeline.stages.training_spec",
    "pipeline.training.trainer",
]
OTHER_WORKER_MODULES = [
    "pipeline.prediction.batch",
    "pipeline.serving.replica",
    "pipeline.workflows.added_task",
    "pipeline.stages.data_check",
    "pipeline.workflows.validation_split",
    "pipeline.stages.splits",
    "pipeline.workflows.tuning_trial",
]


def output_of(code: str, *arguments: object) -> list[str]:
    """The lines that a new process prints; `arguments` are in sys.argv[1] as JSON."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


ANSWER_COMMAND_LINES = """
import json, os, runpy, sys
import pipeline.command_line
print("shared", *sys.modules, flush=True)
for job, command_lines in json.loads(sys.argv[1])[0].items():
    script = f"jobs/{job}.py"
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, script
        continue
    print("job", job)
    for arguments in command_lines:
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            print("exit status:", end.code)
    print(*sys.modules, flush=True)
    os._exit(0)
"""


def wrong_command_lines(job: str) -> list[list[str]]:
    required = REQUIRED.get(job, [])
    wrong = [] if job == "__main__" else [[*required, "--no_such_option", "1"]]
    # add_task reads the finished run, whose config it takes, before its values are checked.
    if job not in ("__main__", "add_task", *WITHOUT_CONFIG_FIELDS):
        wrong.append([*required, "--training.epochs", "-1"])
    if job == "full_pipeline":
        wrong.append(["--until", "no_stage"])
    return wrong


@pytest.fixture(scope="module")
def answered() -> dict[str, list[str]]:
    """Job → the lines that it prints to `--help` and wrong options, then all modules that it has imported.

    Each job is a copy of one process that has imported what every job begins with, and nothing heavy.
    """
    lines = output_of(ANSWER_COMMAND_LINES, {job: [["--help"], *wrong_command_lines(job)] for job in JOBS})
    answers = defaultdict[str, list[str]](list)
    job = ""
    for line in lines:
        if line.startswith("job "):
            job = line.removeprefix("job ")
        else:
            answers[job].append(line)
    (shared,) = answers.pop("")
    assert "pipeline.command_line" in shared.split() and not HEAVY & set(shared.split())
    return answers


@pytest.mark.parametrize("job", JOBS)
def test_help_and_wrong_options_of_a_job_import_nothing_heavy(answered, job):
    *answers, modules = answered[job]
    assert any(line.startswith("usage: ") for line in answers)
    statuses = [line.removeprefix("exit status: ") for line in answers if line.startswith("exit status: ")]
    assert statuses == ([] if job == "__main__" else ["0"]) + ["2"] * len(wrong_command_lines(job))
    assert not HEAVY & set(modules.split())


MODULES_AFTER_IMPORTING = """
import importlib, json, sys
for modules in json.loads(sys.argv[1]):
    [*map(importlib.import_module, modules)]
    print("imported", *sys.modules)
"""


@pytest.fixture(scope="module")
def imported() -> list[set[str]]:
    """All modules of one process after it has imported the tracker, then what decodes images of a batch, then what
    trains, then what else workers do."""
    lines = output_of(MODULES_AFTER_IMPORTING, [TRACKER], [DECODING], TRAINING_MODULES, OTHER_WORKER_MODULES)
    return [set(line.split()[1:]) for line in lines if line.startswith("imported ")]


def test_a_training_worker_imports_only_what_it_trains_with(imported):
    _, _, modules, _ = imported
    assert "torch" in modules
    unused = {"mlflow", "matplotlib", "pandas", "scipy", "sklearn", "networkx", "optuna", "rich", "ray.train"}
    assert not unused & modules


def test_no_worker_imports_what_the_driver_tracks_and_draws_with(imported):
    _, _, _, modules = imported
    assert {*TRAINING_MODULES, *OTHER_WORKER_MODULES} <= modules
    assert not {"mlflow", "matplotlib", "sklearn", "optuna"} & modules


def test_what_decodes_images_of_a_batch_imports_no_torch(imported):
    """Many processes do so, and each would take seconds more to start."""
    _, modules, _, _ = imported
    assert DECODING in modules
    assert not {"torch", "open_clip", "mlflow"} & modules


def test_the_tracker_imports_mlflow_only_when_it_delivers(imported):
    modules, _, _, _ = imported
    assert TRACKER in modules
    assert not {"mlflow", "torch", "ray"} & modules


# --- the rooms of docs/pipeline.md ---------------------------------------------------------------------------

LIBRARIES = {"torch": "torch", "ray": "Ray", "mlflow": "MLflow"}


def room_of(module: str) -> str:
    """A folder or file of pipeline/; `pipeline` for what `import pipeline` gives; jobs, or another library."""
    top, *below = module.split(".")
    return below[0] if top == "pipeline" and below else top


def imports_of_rooms() -> dict[str, set[str]]:
    """Room → rooms and libraries that any line of it imports, at the top or later."""
    found = defaultdict[str, set[str]](set)
    for file in [*REPOSITORY.glob("pipeline/**/*.py"), *REPOSITORY.glob("jobs/*.py")]:
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found[room_of(module)] |= {room_of(name.name) for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, file
                names = [f"pipeline.{name.name}" for name in node.names] if node.module == "pipeline" else [node.module]
                found[room_of(module)] |= set(map(room_of, names))
        found[room_of(module)].discard(room_of(module))
    return found


def test_the_picture_and_the_table_of_rooms_are_those_of_the_imports():
    """An arrow is drawn where no way leads over others; what it leads to may be imported from all that lead to it."""
    page, imports = (REPOSITORY / "docs" / "pipeline.md").read_text(), imports_of_rooms()
    rooms = networkx.DiGraph([(room, other) for room in imports for other in imports[room] & imports.keys()])
    assert networkx.is_directed_acyclic_graph(rooms), networkx.find_cycle(rooms)
    picture = page.partition("flowchart TD\n")[2].partition("```")[0]
    arrows = re.findall(r"^    (\w+) --> (\w+(?: & \w+)*)$", picture, re.MULTILINE)
    drawn = {(room, other) for room, others in arrows for other in others.split(" & ")}
    needed = set(networkx.transitive_reduction(rooms).edges)
    assert drawn == needed, f"docs/pipeline.md lacks {sorted(needed - drawn)}, and has no use for {drawn - needed}"
    for room, named in re.findall(r"^\| `(?:pipeline/)?(\w+)(?:/|\.py)` \|.*\|(?: (.*))? \|$", page, re.MULTILINE):
        of_room = imports.pop(room)
        used = [LIBRARIES[library] for library in LIBRARIES if library in of_room]
        assert named == ", ".join(used), room
    assert set(imports) == {"pipeline"}, "rooms that are not in the table"
