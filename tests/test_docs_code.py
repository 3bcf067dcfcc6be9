"""Every code block of README.md, CONTRIBUTING.md and docs/, checked by its language: Python is executed, configs and
tables are read, each shell command is parsed by its own program, and jobs run until they start Ray.

docs/tutorial.md has its own test. Output and diagrams (`text`) are only labeled.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pipelines import REPOSITORY

import pipeline
from pipeline.clip.load import clip_identity, load_clip, weights_fingerprint
from pipeline.config import CONFIGS, DEMO_CONFIG, DataConfig, load_yaml, parse_config, to_yaml
from pipeline.data.index import index_dataset, read_class_names
from pipeline.data.layouts import OFFICE_HOME_TASKS
from pipeline.files import write_record
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, save_adapter
from pipeline.methods.registry import METHODS
from pipeline.prediction.export import export_open_clip, export_task
from pipeline.prediction.options import GROUPED_ADAPTER, ModelOptions
from pipeline.report.scores import PREDICTIONS
from pipeline.runtime.session import PARENT
from pipeline.runtime.storage import Artifact, Storage
from pipeline.runtime.tracking.journal import Journal
from pipeline.stages.finished_run import GROUPING, SUMMARY, write_provenance
from pipeline.stages.grouping_sources import SingleTasks
from pipeline.tuning.search_file import read_search
from pipeline.workflows.fit import make_config

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES.remove(REPOSITORY / "docs" / "tutorial.md")
FENCED = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(r"(\.ci|benchmarks|cluster|configs|docs|jobs|tests)/")
PUBLISHED = {"OfficeHome": "office_home", "domainnet": "mini_domainnet", "PACS": "pacs", "VLCS": "vlcs"}
EXPORTED = ("coop", "clip_lora")
"""Methods of docs/export.md besides MmAP."""
DIGITS = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], textwrap.dedent(match[3]))
        for match in FENCED.finditer(text)
    ]
    assert text.count("```") == 2 * len(blocks), f"{page.name}: a block that is not closed"
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# Files that the pages presuppose


@pytest.fixture(scope="module")
def world(tmp_path_factory, digits) -> Path:
    """Create a working directory with photos, a finished run, and the folders with absolute paths on the pages."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(digits, folder / "mmap-runs" / "datasets" / "digits")
    write_data_sets(folder / "data")
    write_finished_run(folder / "mmap-runs", data_root=folder / "data" / "new")
    photos = folder / "mmap-runs" / "datasets" / "digits" / "ink_left" / "test"
    (folder / "mmap-runs" / "images").symlink_to(photos)
    (folder / "bucket").symlink_to(folder / "mmap-runs")
    (folder / "mmap-runs" / "shops").symlink_to(folder / "data" / "shops")
    for path in ("photos", "data/photos"):
        (folder / path).symlink_to(photos)
    for name in ("a.png", "b.jpg", "photo.jpg"):
        (folder / name).symlink_to(photos / "one" / "0000.png")
    (folder / "shops.yaml").write_text("name: shops\n")
    (folder / "token").write_text("0123456789abcdef")
    (folder / "token").chmod(0o600)
    return folder


def fill_placeholders(code: str, world: Path) -> str:
    """Replace the placeholders that a reader replaces, and absolute paths by those in `world`."""
    for placeholder, value in {
        "models:/other@champion": "mmap-runs/runs/<run>",
        "hf-hub:OWNER/NAME": "mmap-runs/runs/<run>",
        "<run>": "finished",
        "<head>": "head.example",
        "<registry>": "registry.example",
        "s3://bucket": f"{world}/bucket",
        "/data/": f"{world}/data/",
        "/shared/": f"{world}/shared/",
    }.items():
        code = code.replace(placeholder, value)
    return code


def write_data_sets(root: Path) -> None:
    """Write the datasets of the pages with one empty image per class: before Ray, a job lists images and opens none."""
    for name, preset in PUBLISHED.items():
        config = parse_config(load_yaml(CONFIGS / f"{preset}.yaml")).data
        touch(root / name, config.tasks or OFFICE_HOME_TASKS, classes_of(preset))
    touch(root / "new", ["ink_left", "Clipart", "sketch"], DIGITS)
    page = REPOSITORY / "docs" / "datasets.md"
    for path in re.findall(r"^/data/(shops/.+)$", page.read_text(), re.MULTILINE):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    for block in blocks_of(page):
        if block.language == "csv" and "split" in block.code:
            write_manifest(block.code, root / "labeled")
    tasks, classes = ["art_painting", "cartoon", "photo", "sketch"], classes_of("pacs")
    rows = [{"image": b"", "domain": task, "label": label} for task in tasks for label in classes]
    (root / "pacs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "pacs" / "train.parquet")


def write_manifest(code: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (file := folder / "images.csv").write_text(code)
    for row in csv.DictReader(code.splitlines()):
        (folder / row["path"]).parent.mkdir(exist_ok=True)
        (folder / row["path"]).touch()
    return file


def classes_of(preset: str) -> list[str]:
    return list(read_class_names(CONFIGS / "class_names" / f"{preset}.txt"))


def touch(root: Path, tasks, classes) -> None:
    for task in tasks:
        for name in classes:
            (root / task / name).mkdir(parents=True)
            (root / task / name / "1.jpg").touch()


def write_finished_run(storage: Path, data_root: Path) -> None:
    """Write the files of a finished run of the demo's CLIP on two tasks, with initial prompts."""
    values = load_yaml(DEMO_CONFIG)
    data = values["data"] | {"root": str(data_root), "use_official_splits": False}
    config = parse_config(values | {"data": data, "grouping": {"affinity": "gradient"}})  # no task was trained alone
    group, towers = {"Clipart": DIGITS, "ink_left": DIGITS}, load_clip(config.clip)
    folder = storage / "runs" / "finished"
    (folder / GROUPED_ADAPTER).parent.mkdir(parents=True)
    names = {"mmap": GROUPED_ADAPTER} | {method: f"adapters/{method}.safetensors" for method in EXPORTED}
    for method, name in names.items():
        state = METHODS[method].build(config, towers, group).state_dict()
        save_adapter(folder / name, TrainedAdapter(method, config, weights_fingerprint(towers), (group,), (state,)))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / SUMMARY).parent.mkdir()
    methods = {
        "grouped": {"accuracy": dict.fromkeys(group, 0.5), "average": 0.5, "test_loss": dict.fromkeys(group, 1.0)}
    }
    summary = {"tasks": [*group], "groups": [[*group]], "methods": methods, "num_test_images": dict.fromkeys(group, 1)}
    write_record(folder / SUMMARY, summary)
    row = {"task": "ink_left", "method": "grouped", "true_label": "one", "label": "two", "probability": 0.5}
    row["loss"] = 0.7
    pq.write_table(pa.Table.from_pylist([row], schema=PREDICTIONS), folder / "report" / "predictions.parquet")
    write_record(folder / GROUPING, {"tasks": [*group], "groups": [[*group]], "affinity": [[1, 0], [0, 1]]})
    snapshots = Artifact(Storage.from_folder(storage), "global_prompt", {"clip": vars(clip_identity(config.clip))})
    with snapshots.writer():
        pass
    write_provenance(SimpleNamespace(folder=folder), [snapshots], SingleTasks())
    Journal(folder / "tracking-finished").record("start", PARENT, {"parent": None})
    Storage.from_folder(storage).write_marker()


def names_of(page: str, world: Path) -> dict[str, object]:
    """Return the variables that the Python code of a page presupposes."""
    if page == "task_grouping.md":
        steps = np.array([[[2, 0], [-1, 2], [2, 1], [-1, 3]]] * 4)
        return {"names": ["photo", "sketch", "art", "clipart"], "gradients": steps}
    if page == "export.md" and not (world / "ink_left.onnx").exists():
        finished = world / "mmap-runs" / "runs" / "finished"
        for name in ("ink_left.pt2", "ink_left.onnx"):
            export_task(load_adapter(finished / GROUPED_ADAPTER), ModelOptions(), "ink_left", world / name)
        adapter = load_adapter(finished / "adapters" / "clip_lora.safetensors")
        export_open_clip(adapter, ModelOptions(), "ink_left", world / "merged")
    noisy = sorted((world / "mmap-runs" / "datasets" / "digits" / "ink_right").glob("test/*/*.png"))[::8]
    return {"images": noisy, "labels": [path.parent.name for path in noisy], "source": "mmap-runs/runs/finished"}


# The languages


def check_python(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute the block after the previous ones of its page, and compare values with those in comments.

    `pipeline.fit` and the stages give the finished run; tests/test_fit.py tests what they do.
    """
    names, finished = names_of(block.page.name, world), "mmap-runs/runs/finished"

    def fit(arguments, config, last_stage, verbose):
        data = make_config(config, arguments, "fit").data
        index_dataset(data, Path(data.root))
        return pipeline.open_run(finished)

    artifact = SimpleNamespace(download=lambda: Path(finished))
    monkeypatch.setattr("pipeline.workflows.fit.fit", fit)
    monkeypatch.setattr("pipeline.stages.run.open_run", lambda config, console: nullcontext((None, None)))
    monkeypatch.setattr("pipeline.stages.flow.run_stages", lambda plan, session, until: {until: artifact})
    for earlier in BLOCKS:
        if (earlier.page, earlier.language) == (block.page, "python") and earlier.line <= block.line:
            code = "\n" * earlier.line + fill_placeholders(earlier.code, world)  # for the lines of a traceback
            exec(compile(code, str(block.page), "exec"), names)
    for line in block.code.splitlines():
        expression, _, comment = line.partition("  # ")
        try:
            expected = ast.literal_eval(comment.split(": ")[0])
        except (SyntaxError, ValueError):  # prose
            continue
        assert eval(expression, names) == expected, line


def check_yaml(block: Block, tmp_path: Path) -> None:
    (file := tmp_path / "block.yaml").write_text(block.code)
    values = load_yaml(file)
    if "fields" in values:
        read_search(file, parse_config(load_yaml(DEMO_CONFIG)))
    else:
        parse_config(values)


def check_manifest(block: Block, tmp_path: Path) -> None:
    """Those without splits show several labels per image."""
    has_splits = "split" in block.code
    config = DataConfig(use_official_splits=has_splits, multi_label=not has_splits)
    dataset = index_dataset(config, write_manifest(block.code, tmp_path))
    assert len(dataset.images) == len({row["path"] for row in csv.DictReader(block.code.splitlines())})


def check_class_names(block: Block, tmp_path: Path) -> None:
    (file := tmp_path / "classes.txt").write_text(block.code)
    read_class_names(file)


def check_sh(block: Block, world: Path) -> None:
    code = fill_placeholders(block.code, world)
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    for words in commands(code):
        check_command(words)


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command, without variable assignments and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in (";", "&&", "|", "(", ")"):
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words:
                yield list(takewhile(lambda word: word not in ("<", ">", ">>"), words))
            words = []


def check_command(words: list[str]) -> None:
    for word in words:
        assert not REPOSITORY_PATH.match(word) or (REPOSITORY / word).exists(), f"{word} does not exist"
    match words:
        case ["mmap-clip", job, *options]:
            check_job(f"jobs/{job.replace('-', '_')}.py", options)
        case ["python", script, *options] if script.startswith("jobs/"):  # in a container, or submitted to Ray
            check_job(script, options)
        case ["make", target]:
            assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), target
        case ["ray", *arguments]:
            from ray.scripts.scripts import cli as ray_program  # as MLflow's: every process imports this module

            parameters = parsed(ray_program, arguments)
            if "entrypoint" in parameters:  # `ray job submit`
                check_command([*parameters["entrypoint"]])
            for inner in commands(parameters.get("cmd") or ""):  # `ray exec`
                check_command(inner)
        case ["mlflow", *arguments]:
            from mlflow.cli import cli as mlflow_program

            parsed(mlflow_program, arguments)
        case ["docker", "compose", "run" | "exec", *arguments]:
            service, *inner = [word for word in arguments if word not in ("--rm", "-T")]
            assert service in yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"], service
            check_command(inner)
        case ["curl", *arguments]:
            if "-d" in arguments:
                json.loads(arguments[arguments.index("-d") + 1])
        case ["cluster/make_env.sh" as script]:
            assert os.access(REPOSITORY / script, os.X_OK), f"{script} is not executable"
        case ["pip", "install", "."]:
            pass
        case ["pip", "install", requirement]:
            name, extra = re.fullmatch(r"(.+)\[(.+)\]", requirement).groups()
            project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
            assert name == project["name"] and extra in project["optional-dependencies"], requirement
        case ["sbatch" | "srun", *options] if "mmap-clip.sbatch" in options or "mmap-clip" in options:
            start = next(options.index(word) for word in ("mmap-clip.sbatch", "mmap-clip") if word in options)
            # %a is the number of an array's task.
            check_command(["mmap-clip", *(word.replace("%a", "1") for word in options[start + 1 :])])
        case ["apptainer", "build" | "run", _, *_] | ["cp", _, _] | ["hf", "download", _] | ["hf", "auth", "login"]:
            pass
        case ["pg_dump" | "pg_restore" | "tar", *_]:
            pass
        case ["install", "--mode", _, "/dev/null", _] | ["openssl", "rand", "-hex", _]:
            pass
        case ["sudo", *command]:
            check_command(command)
        case ["nginx", "-t"] | ["nginx", "-s", "reload"]:
            pass
        case ["bash", ".ci/run"] | ["cd" | "set" | "." | "umask" | "git" | "docker" | "kubectl", *_]:
            pass
        case _:
            pytest.fail(f"no check for the command: {shlex.join(words)}")


def parsed(program: click.Command, arguments: list[str]) -> dict[str, object]:
    """Return the options and arguments of the subcommand, as parsed by click."""
    while isinstance(program, click.Group):
        name, *arguments = arguments
        subcommand = program.get_command(click.Context(program), name)
        assert subcommand, f"{program.name} has no {name}"
        program = subcommand
    return program.make_context(program.name, arguments).params


class StartsRay(Exception):
    """Raised when a job connects to Ray or MLflow."""


def check_job(script: str, options: list[str]) -> None:
    """Run the job until it connects to Ray or looks up a run in MLflow, or to its end."""

    def stop(*arguments, **options):
        raise StartsRay

    def fetch_weights(*arguments):
        assert Path(script).stem not in ("build_splits", "check_data"), "reads images only, also without a network"

    with mock.patch.dict(os.environ), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [script, *options])
        for function in (
            "pipeline.runtime.cluster.connect",
            "pipeline.runtime.tracking.mlflow_adapter.find_run",
            "pipeline.workflows.resend.check_reachable",
            "pipeline.prediction.export.export_task",
            "pipeline.prediction.export.export_open_clip",
            "pipeline.workflows.upload.repository_folder",
        ):
            patched.setattr(function, stop)
        patched.setattr("pipeline.stages.plan.fetch_weights", fetch_weights)
        # The files that the Python code of a page uses.
        patched.setattr("pipeline.prediction.output_files.check_new_output", lambda output: None)
        patched.setattr("huggingface_hub.get_token", lambda: "a token")
        patched.setattr("pipeline.serving.service.port_error", lambda host, port: None)  # it may be in use
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except StartsRay:
            pass
        except SystemExit as end:
            assert not end.code, f"{shlex.join([script, *options])} ends with status {end.code}"


CHECKS = {
    "sh": check_sh,
    "python": None,
    "yaml": check_yaml,
    "csv": check_manifest,
    "tsv": check_class_names,
    "json": lambda block, folder: json.loads(block.code),
    "text": None,
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_code_block(block, world, tmp_path, monkeypatch):
    assert block.language in CHECKS, f"label the block: one of {', '.join(CHECKS)}"
    monkeypatch.chdir(world)
    if block.language == "python":
        check_python(block, world, monkeypatch)
    elif check := CHECKS[block.language]:
        check(block, world if block.language == "sh" else tmp_path)


def test_the_code_for_onnx_runtime_predicts_what_the_package_does(world, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(world)
    names = names_of("export.md", world)
    (block,) = [block for block in BLOCKS if block.page.name == "export.md" and "import onnxruntime" in block.code]
    Image.effect_noise((57, 40), 90).convert("RGB").save("photo.png")
    exec(block.code.replace("photo.jpg", "photo.png"), names)
    model = pipeline.load("mmap-runs/runs/finished", temperature=1, precision="float32")  # another page calibrates it
    expected = model.predict("photo.png", "ink_left")
    assert list(expected.probabilities) == names["classes"]
    np.testing.assert_allclose(names["probabilities"][0], list(expected.probabilities.values()), atol=1e-5)
