"""Imports: help and workers do without libraries that take seconds to import; packages depend on each other without
cycles, as docs/pipeline.md shows."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections import defaultdict

import networkx
import pytest
from pipelines import REPOSITORY

from jobs.__main__ import job_names
from pipeline.imports import deferred

HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "ray",
    "mlflow",
    "pandas",
    "scipy",
    "matplotlib",
    "sklearn",
    "open_clip",
    "pyarrow",
}
REQUIRED = {
    "add_task": ["--run", "a_run", "--task", "a_task"],
    "export": ["a_run", "--output", "a_file.onnx"],
    "predict": ["a_run", "an_image"],
    "push": ["a_run", "owner/name"],
    "register_model": ["--run", "a_run"],
    "resend": ["a_storage"],
    "serve": ["--models", "a_name=a_run"],
    "tune": ["--search", "a_search.yaml"],
    "verify": ["a_storage"],
}
WITHOUT_CONFIG_FIELDS = ("export", "list_models", "predict", "push", "register_model", "resend", "serve", "verify")
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


def run_code(code: str, *arguments: object) -> list[str]:
    """Return the lines that a new process prints; it gets `arguments` in sys.argv[1] as JSON."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


RUN_COMMAND_LINES = """
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
        except SystemExit as exited:
            print("exit status:", exited.code)
    print(*sys.modules, flush=True)
    os._exit(0)
"""


def invalid_command_lines(job: str) -> list[list[str]]:
    required = REQUIRED.get(job, [])
    command_lines = [] if job == "__main__" else [[*required, "--no_such_option", "1"]]
    # add_task reads the config of the finished run before it validates values.
    if job not in ("__main__", "add_task", *WITHOUT_CONFIG_FIELDS):
        command_lines.append([*required, "--training.epochs", "-1"])
    if job == "full_pipeline":
        command_lines.append(["--until", "no_stage"])
    return command_lines


@pytest.fixture(scope="module")
def output_by_job() -> dict[str, list[str]]:
    """Job → the lines that it prints for `--help` and invalid options, followed by all modules that it imported.

    Each job is forked from one process that has imported the modules shared by all jobs, and nothing heavy.
    """
    lines = run_code(RUN_COMMAND_LINES, {job: [["--help"], *invalid_command_lines(job)] for job in JOBS})
    outputs = defaultdict[str, list[str]](list)
    job = ""
    for line in lines:
        if line.startswith("job "):
            job = line.removeprefix("job ")
        else:
            outputs[job].append(line)
    (shared,) = outputs.pop("")
    assert "pipeline.command_line" in shared.split() and not HEAVY & set(shared.split())
    return outputs


@pytest.mark.parametrize("job", JOBS)
def test_help_and_invalid_options_import_nothing_heavy(output_by_job, job):
    *lines, modules = output_by_job[job]
    assert any(line.startswith("usage: ") for line in lines)
    statuses = [line.removeprefix("exit status: ") for line in lines if line.startswith("exit status: ")]
    assert statuses == ([] if job == "__main__" else ["0"]) + ["2"] * len(invalid_command_lines(job))
    assert not HEAVY & set(modules.split())


MODULES_AFTER_IMPORTING = """
import importlib, json, sys
for modules in json.loads(sys.argv[1]):
    [*map(importlib.import_module, modules)]
    print("imported", *sys.modules)
from pipeline.clip.load import build_meta_towers, clip_identity
from pipeline.config import DEMO_CONFIG, load_yaml, parse_config
config = parse_config(load_yaml(DEMO_CONFIG)).clip
clip_identity(config)
build_meta_towers(config)
print("imported", *sys.modules)
import torch
from pipeline.config import TrainingConfig
from pipeline.training.optimizers import OPTIMIZERS
for new_optimizer in OPTIMIZERS.values():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = new_optimizer([parameter], TrainingConfig())
    optimizer.zero_grad()
    parameter.sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print("imported", *sys.modules)
"""


@pytest.fixture(scope="module")
def imported() -> list[set[str]]:
    """All modules of one process after importing the tracker, then the decoding of batch images, then the training
    modules, then the other modules of workers, then after checking a CLIP and its weights, then after the use of
    optimizers."""
    lines = run_code(MODULES_AFTER_IMPORTING, [TRACKER], [DECODING], TRAINING_MODULES, OTHER_WORKER_MODULES)
    return [set(line.split()[1:]) for line in lines if line.startswith("imported ")]


def test_a_training_worker_imports_no_unused_libraries(imported):
    modules = imported[2]
    assert "torch" in modules
    unused = {"mlflow", "matplotlib", "pandas", "scipy", "sklearn", "networkx", "optuna", "rich", "ray.train"}
    assert not unused & modules


def test_no_worker_imports_libraries_of_the_driver(imported):
    modules = imported[3]
    assert {*TRAINING_MODULES, *OTHER_WORKER_MODULES} <= modules
    assert not {"mlflow", "matplotlib", "sklearn", "optuna"} & modules


def test_decoding_of_batch_images_imports_no_torch(imported):
    """It runs in many processes, and torch would add seconds to the start of each."""
    modules = imported[1]
    assert DECODING in modules
    assert not {"torch", "open_clip", "mlflow"} & modules


def test_the_tracker_imports_mlflow_lazily(imported):
    modules = imported[0]
    assert TRACKER in modules
    assert not {"mlflow", "torch", "ray"} & modules


def test_a_clip_is_checked_without_libraries_that_only_some_towers_need(imported):
    modules = imported[4]
    assert {"open_clip", "torchvision"} <= modules
    assert not {"timm", "transformers", "torch._dynamo", "sympy"} & modules


def test_optimizers_do_not_import_the_compiler(imported):
    """It would take as long as importing torch, in each training worker."""
    assert not {"torch._dynamo", "sympy"} & imported[5]


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """`large`, with a module `large.inner`, and `user`, which imports them; `large` is imported when it is used."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large/__init__.py").write_text("VALUE = 3\n\nclass Base: pass\n")
    (tmp_path / "large/inner.py").write_text("def double(number): return 2 * number\n")
    (tmp_path / "user.py").write_text(
        "import large\nfrom large.inner import double\nimport large.inner as inner\nfrom large import Base\n"
        "try: import missing\nexcept ImportError: missing = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded, finders = set(sys.modules), [*sys.meta_path]
    with deferred("large", "missing"):
        user = importlib.import_module("user")
    assert sys.meta_path == finders and set(sys.modules) - loaded == {"user"}
    yield user
    for name in set(sys.modules) - loaded:
        del sys.modules[name]


@pytest.mark.parametrize(
    "use",
    [
        lambda user: user.double(2) == 4,
        lambda user: user.inner.double(2) == 4,
        lambda user: user.large.VALUE.real == 3,
        lambda user: isinstance(user.Base(), user.Base) and not isinstance(3, user.Base),
    ],
)
def test_a_deferred_library_is_imported_when_it_is_used(libraries, use):
    assert libraries.missing is None and use(libraries)
    assert libraries.double(1) == importlib.import_module("large.inner").double(1)


def test_a_library_that_is_used_in_the_block_is_imported_there(libraries):
    with deferred("large"):
        import large

        assert large.Base() and isinstance(sys.modules["large"].VALUE, int)


def test_an_imported_library_is_not_deferred(libraries):
    large = importlib.import_module("large")
    with deferred("large"):
        assert importlib.import_module("large") is large


# --- packages, as in docs/pipeline.md --------------------------------------------------------------------------

LIBRARIES = {"torch": "torch", "ray": "Ray", "mlflow": "MLflow"}


def package_name(module: str) -> str:
    """Return the folder or file in pipeline/; `pipeline` for its __init__; jobs; or a library."""
    top, *submodules = module.split(".")
    return submodules[0] if top == "pipeline" and submodules else top


def imports_by_package() -> dict[str, set[str]]:
    """Package → packages and libraries that it imports anywhere, also inside functions."""
    imports = defaultdict[str, set[str]](set)
    for file in [*REPOSITORY.glob("pipeline/**/*.py"), *REPOSITORY.glob("jobs/*.py")]:
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imports[package_name(module)] |= {package_name(name.name) for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, file
                names = [f"pipeline.{name.name}" for name in node.names] if node.module == "pipeline" else [node.module]
                imports[package_name(module)] |= set(map(package_name, names))
        imports[package_name(module)].discard(package_name(module))
    return imports


def test_the_diagram_and_the_table_of_packages_match_the_imports():
    """The diagram shows the transitive reduction of the dependencies."""
    page, imports = (REPOSITORY / "docs" / "pipeline.md").read_text(), imports_by_package()
    graph = networkx.DiGraph([(user, used) for user in imports for used in imports[user] & imports.keys()])
    assert networkx.is_directed_acyclic_graph(graph), networkx.find_cycle(graph)
    arrows = re.findall(r"^(\w+) +──► (\w+(?:, \w+)*)$", page, re.MULTILINE)
    drawn = {(user, used) for user, targets in arrows for used in targets.split(", ")}
    needed = set(networkx.transitive_reduction(graph).edges)
    assert drawn == needed, f"docs/pipeline.md: missing {sorted(needed - drawn)}, superfluous {drawn - needed}"
    for package, libraries in re.findall(
        r"^\| `(?:pipeline/)?(\w+)(?:/|\.py)` \|.*\|(?: (.*))? \|$", page, re.MULTILINE
    ):
        modules = imports.pop(package)
        assert libraries == ", ".join(name for library, name in LIBRARIES.items() if library in modules), package
    assert set(imports) == {"pipeline"}, "packages that are not in the table"
