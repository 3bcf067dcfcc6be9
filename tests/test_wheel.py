"""The wheel: installed and run outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pipelines import REPOSITORY, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that no build folder is left in the repository."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pipeline", "jobs", "configs", "README.md", "LICENSE", "pyproject.toml"):
        if (REPOSITORY / name).exists():
            subprocess.run(["cp", "-r", REPOSITORY / name, source / name], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built, source]
    subprocess.run(command, check=True)
    (file,) = built.glob("*.whl")
    return file


def test_the_wheel_has_code_jobs_and_configs_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pipeline", "jobs", "mmap_clip"}
    data = ("pipeline/demo/digits_clip.safetensors", "pipeline/report/paper_results.yaml", "pipeline/py.typed")
    assert {*data, "jobs/full_pipeline.py"} <= set(names)
    assert any(name.endswith("share/mmap-clip/configs/demo.yaml") for name in names)
    assert any(name.endswith("share/mmap-clip/configs/class_names/office_home.txt") for name in names)
    assert not [name for name in names if "test" in name or "__pycache__" in name]


@pytest.mark.fault_injection
def test_one_command_runs_the_demo_of_an_installed_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True)
    finished = run(
        tmp_path / "storage",
        *("--data.tasks", "[blur_left, blur_right]", "--training.epochs", "2", "--global_prompt.epochs", "2"),
        prefix=(str(target / "bin" / "mmap-clip"), "full_pipeline"),
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
    )
    assert finished.status == 0 and "MmAP, grouped" in finished.output, finished.output
    process = subprocess.run(
        [sys.executable, "-c", "import pipeline, pipeline.config as c; print(pipeline.__file__, c.CONFIGS)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.split() == [str(target / "pipeline" / "__init__.py"), str(target / "share/mmap-clip/configs")]


@pytest.mark.parametrize(
    ("arguments", "status", "text"), [(["--help"], 0, "full-pipeline"), (["oops"], 2, "unknown job")]
)
def test_jobs_are_listed(arguments, status, text):
    command = [sys.executable, "-m", "jobs", *arguments]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == status and text in process.stdout + process.stderr
