"""mmap-clip runs: what a storage holds, as a table and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import REPOSITORY

from jobs.__main__ import run_script
from pipeline.config import parse_config, to_yaml
from pipeline.files import write_record

METHODS = {"zero_shot": 0.5, "coop": 0.6, "each_alone": 0.731, "all_in_one": 0.714, "grouped": 0.75}


def write_run(storage: Path, folder_name: str, age_s: int, stages=(), finished=False, **values) -> Path:
    folder = storage / "runs" / folder_name
    (folder / "report").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(parse_config(values)))
    write_record(folder / "stage_seconds.json", dict.fromkeys(stages, 1.5))
    if finished:
        methods = {method: {"average": average, "accuracy": {}} for method, average in METHODS.items()}
        write_record(folder / "report/summary.json", {"tasks": ["a", "b", "c"], "methods": methods})
    for file in folder.rglob("*.*"):
        os.utime(file, (1.7e9 - age_s,) * 2)
    return folder


@pytest.fixture
def storage(tmp_path):
    storage = tmp_path / "a %20 #1"
    write_run(storage, "shops-1", 100, finished=True, name="shops", data={"root": "/data/shops", "shots": 8}, seed=3)
    write_run(storage, "pets-2", 50, ("data_check", "splits"), data={"root": "/data/2024", "tasks": ["no", "7"]})
    write_run(storage, "office-3", 200)
    (storage / "runs/empty-4").mkdir()
    (write_run(storage, "broken-5", 300) / "config.yaml").write_text("a: [1\n")
    (cut := write_run(storage, "broken-6", 400, finished=True) / "report/summary.json").write_text('{"tasks": ["a"')
    os.utime(cut, (1.6e9,) * 2)
    (storage / "runs/notes.txt").touch()
    return storage


@pytest.fixture
def runs(monkeypatch, capsys):
    """Call the job: (*arguments) → exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmap-clip runs", *map(str, arguments)])
        status = 0
        try:
            run_script("runs")
        except SystemExit as exited:
            status = exited.code
        return status, *capsys.readouterr()

    return call


def test_runs_are_listed_with_their_figures_and_state(storage, runs):
    status, output, error = runs("--storage", storage)
    assert (status, error) == (0, "")
    lines = {line.split()[2]: line.split() for line in output.splitlines() if line.startswith("20")}
    assert list(lines) == ["pets-2", "shops-1", "office-3", "broken-5", "broken-6"]
    assert lines["shops-1"][3:] == ["/data/shops", "3", "8", "3", "50.0", "73.1", "71.4", "75.0", "finished"]
    assert lines["pets-2"][3:] == ["/data/2024", "2", "6", "1", "1", "few-shot", "splits"]
    assert lines["office-3"][-1] == "started"
    assert "empty-4" in output and "config.yaml is missing" in output and output.count("cannot be read") == 2
    assert str(storage) in output


def test_json_has_all_methods_and_the_folder(storage, runs):
    for location in (storage, storage.as_uri()):
        records = json.loads(runs("--storage", location, "--json")[1])
        run_by_name = {Path(run["run"]).name: run for run in records}
        shops = run_by_name["shops-1"]
        assert shops["run"] == f"{location}/runs/shops-1"
        assert (shops["name"], shops["data"], shops["shots"], shops["seed"]) == ("shops", "/data/shops", 8, 3)
        assert shops["accuracy"] == METHODS and shops["finished"] and shops["changed"] == "2023-11-14T22:11:40+00:00"
        assert run_by_name["pets-2"]["tasks"] == ["no", "7"] and run_by_name["pets-2"]["last_stage"] == "splits"
        assert "config.yaml" in run_by_name["broken-5"]["problem"] and shops["problem"] is None
        assert run_by_name["empty-4"]["problem"] == "config.yaml is missing or empty"


def test_runs_are_selected_by_name_and_number(storage, runs):
    names = [
        [run["run"].rpartition("/")[2] for run in json.loads(runs("--storage", storage, "--json", *arguments)[1])]
        for arguments in (["SHOP"], ["*-[12]"], ["--limit", "1"], ["nothing"])
    ]
    assert names == [["shops-1"], ["pets-2", "shops-1"], ["pets-2"], []]
    assert "5 older runs are not listed" in runs("--storage", storage, "--limit", "1")[2]
    status, _, error = runs(storage / "runs")
    assert status == 2 and f"--storage '{storage / 'runs'}'" in error


def test_an_empty_storage_says_how_to_make_a_run(tmp_path, runs):
    (empty := tmp_path / "try #2").mkdir()
    status, output, error = runs("--storage", empty)
    assert (status, output) == (0, "") and f"mmap-clip full-pipeline --storage '{empty}' makes one" in error
    status, _, error = runs("--storage", tmp_path / "absent")
    assert status == 2 and "does not exist" in error


def test_listing_imports_neither_torch_nor_ray(storage):
    code = (
        "import runpy, sys; sys.argv = ['runs', '--storage', sys.argv[1]]; "
        "runpy.run_path('jobs/runs.py', run_name='__main__'); "
        "assert not {'torch', 'ray', 'mlflow', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(storage)], cwd=REPOSITORY, check=True, capture_output=True)
